"""`compress`: one pass over a model, from its original weights to one elastic checkpoint for every prune rate."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniql_jax import console
from uniql_jax.commands import compilation_cache
from uniql_jax.commands.compress_options import DEFAULTS, RECOVERY, parser
from uniql_jax.compression.settings import CompressionSettings, Resources
from uniql_jax.errors import UserError
from uniql_jax.train.settings import RecoverySettings, alpha_of

if TYPE_CHECKING:
    from uniql_jax.compression.contract import Gains

CACHED = 4096  # tokens of the text whose state the summary counts
RATES = (0.0, 0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35)


def summary(out: str | Path) -> str:
    """Sizes of a finished checkpoint at each rate, and the commands to go on with."""
    from uniql_jax.checkpoint import open_checkpoint
    from uniql_jax.model.decoding import cache_bytes

    checkpoint = open_checkpoint(Path(out).expanduser())
    plan = checkpoint.plan
    assert plan is not None
    rows = [
        [
            f"{rate:g}",
            f"{plan.kept_fraction(rate):.3f}",
            console.format_bytes(checkpoint.weight_bytes(rate)),
            console.format_bytes(cache_bytes(checkpoint.config, checkpoint.keep(rate), 1, CACHED)),
        ]
        for rate in RATES
    ]
    return "\n".join(
        [
            console.table(rows, ["prune rate", "kept", "weights", f"state after {CACHED} tokens"]),
            "",
            "Next:",
            f"  python -m uniql_jax.evaluate --ckpt {out} --text TEXT --prune-rates 0,0.15,0.25,0.35",
            f'  python -m uniql_jax.generate --ckpt {out} --prune-rate 0.25 --prompt "Once upon a time"',
            f"  python -m uniql_jax.export {out} {out}-hf --prune-rate 0.25",
        ]
    )


def gains(recovered: Gains, tuned: Gains | None = None) -> str:
    """Validation perplexity of the sorted model at fixed rates before and after recovery (unquantized), and of the
    quantized one before and after tuning.
    """
    stages = [recovered, *([tuned] if tuned is not None else [])]
    rows = [
        [f"{rate:g}", *(math.exp(losses[rate]) for stage in stages for losses in (stage.before, stage.after))]
        for rate in sorted(recovered.before)
    ]
    return console.table(
        rows, ["prune rate", "validation perplexity", "recovered", "quantized", "tuned"][: 1 + 2 * len(stages)]
    )


def _settings(args: Any) -> CompressionSettings:
    return dataclasses.replace(
        DEFAULTS,
        bits=args.bits,
        nested=args.nested_bits,
        groups=args.groups,
        seed=args.seed,
        mlp_score=args.mlp_score,
        pair_score=args.pair_score,
        value_output=args.value_output,
        channel_score=args.channel_score,
        state_score=args.state_score,
        plan="uniform" if args.uniform else args.plan or DEFAULTS.plan,
        rotate=DEFAULTS.rotate and not args.no_rotate,
        rounding=args.rounding,
        refit=args.refit,
        reconstruct=args.reconstruct,
        precision=args.precision,
        stream_dtype=args.stream_dtype,
    )


def _recovery(args: Any, specs: Sequence[str]) -> RecoverySettings:
    from uniql_jax.compression.own_windows import is_own
    from uniql_jax.train.settings import on_device

    distill = args.recover_distill
    if distill is None:
        distill = 1.0 if all(map(is_own, specs)) else RECOVERY.distill
    return dataclasses.replace(
        RECOVERY,
        steps=args.recover_steps,
        lr=args.recover_lr,
        rank=args.recover_rank,
        alpha=alpha_of(args.recover_rank),
        batch=args.recover_batch,
        rates=args.recover_rates,
        distill=distill,
        adapt=args.recover_adapt,
        **on_device(),
        seed=args.seed,
    )


def main(argv: list[str]) -> None:
    """Run the command; raises UserError."""
    options = parser()
    args = options.parse_args(argv)
    if args.recover is None:
        for name in sorted(name for name in options.given(argv) if name.startswith("recover_")):
            raise UserError(f"--{name.replace('_', '-')} goes with --recover")
    if args.coordinator is None and (args.processes is not None or args.process is not None):
        raise UserError("--processes and --process go with --coordinator")
    if args.coordinator is None:
        return _run(args)
    if args.coordinator != "auto":
        if args.processes is None or args.process is None:
            raise UserError("--coordinator HOST:PORT wants --processes N and --process I")
        if args.process >= args.processes:
            raise UserError(f"--process {args.process}: {args.processes} processes have numbers from 0")
        if not re.fullmatch(r".+:[0-9]+", args.coordinator):
            raise UserError(f"--coordinator must be HOST:PORT or auto, not {args.coordinator!r}")
    from uniql_jax.compression.joining import joined

    with joined(args.coordinator, args.processes, args.process):
        _run(args)


def _run(args: Any) -> None:
    from uniql_jax.compression.compress import compress
    from uniql_jax.compression.describe import format_seconds
    from uniql_jax.compression.own_windows import OWN
    from uniql_jax.compression.processes import Processes

    first = Processes().index == 0
    recover = () if args.recover is None else args.recover or [OWN]
    resources = Resources(
        devices=args.devices,
        max_device_memory=args.max_device_memory,
        max_host_memory=args.max_host_memory,
        max_disk=args.max_disk,
    )
    compilation_cache.use(args.compilation_cache)
    start = time.perf_counter()
    report = compress(
        args.ckpt,
        args.out,
        calib=args.calib or (),
        calib_windows=args.calib_windows,
        calib_length=args.calib_length,
        settings=_settings(args),
        resources=resources,
        recover=recover,
        recover_settings=_recovery(args, recover),
        recover_length=args.recover_length,
        recover_tune=args.recover_tune,
        resume=args.resume,
        overwrite=args.overwrite,
        dry_run=args.dry_run,
        dequantize_source=args.dequantize_source,
        log=args.log if first else None,
        progress=console.progress if first else lambda items, _: items,
        say=(lambda text: print(text, flush=True)) if first else lambda text: None,
    )
    if not first:
        return
    if report is not None:
        print(f"\n{args.out}: {console.format_bytes(report.bytes)} in {format_seconds(time.perf_counter() - start)}\n")
        if report.recovered is not None:
            print(gains(report.recovered, report.tuned) + "\n")
    if not args.dry_run:
        print(summary(args.out))
