"""Recovery of a sorted 16-bit checkpoint: masked LoRA trained at all prune rates, merged into one of the same form."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from uniql_jax import console, elastic
from uniql_jax.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint, reachable_bias, stored
from uniql_jax.errors import UserError
from uniql_jax.files import check_output, check_space, staged_output
from uniql_jax.tokenizer import load_tokenizer
from uniql_jax.train import examples, lora, recover
from uniql_jax.train.examples import Examples
from uniql_jax.train.loop import RecoverySettings, data_mesh, memory_bytes, resolved
from uniql_jax.version import __version__

DEFAULTS = RecoverySettings()
LENGTH = 256


def open_trainable(folder: str) -> Checkpoint:
    """A sorted checkpoint of 16 or 32 bits; UserError for any other."""
    checkpoint = open_checkpoint(Path(folder).expanduser())
    if checkpoint.bits < 16:
        raise UserError(
            f"{folder} is quantized to {checkpoint.bits} bits and cannot be trained; "
            "make a sorted one with python -m uniql_jax.compress --bits 16"
        )
    if checkpoint.plan is None:
        raise UserError(f"{folder} was never sorted; make a sorted one with python -m uniql_jax.compress --bits 16")
    return checkpoint


def work_folder(out: str) -> Path:
    """Where a run keeps what is done."""
    target = Path(out).expanduser().absolute()
    return target.with_name(f"{target.name}.partial")


def refuse_early(out: str, resume: bool, overwrite: bool) -> None:
    """Raise UserError for what stands in the way at `out`, before anything long begins."""
    check_output(out, overwrite)
    folder = work_folder(out)
    if folder.exists() and not resume:
        raise UserError(f"{folder} holds an unfinished run; add --resume to go on with it, or remove it to start anew")


def load_examples(checkpoint: Checkpoint, args: argparse.Namespace) -> tuple[Examples, Examples]:
    """(to train on, to judge by), with the checkpoint's own tokenizer; UserError for bad text."""
    config, tokenizer = checkpoint.config, load_tokenizer(checkpoint.folder)
    end = config.eos_ids[0] if config.eos_ids else getattr(tokenizer, "eos_token_id", None)
    read: dict[str, Any] = {"vocab_size": config.vocab_size, "end": end, "seed": args.seed}
    learnt = examples.load(args.data, tokenizer, args.length, args.examples, **read)
    if args.judge:
        return learnt, examples.load(args.judge, tokenizer, args.length, DEFAULTS.held_most, **read)
    return examples.split(learnt, DEFAULTS.held_share, DEFAULTS.held_most, args.seed)


def describe(checkpoint: Checkpoint, out: str, options: RecoverySettings, learnt: Examples, judged: Examples) -> str:
    """The plan: what will be trained on what, and what it takes."""
    config = checkpoint.config
    trained, frozen = lora.planned(config, options.rank)
    mesh = data_mesh(options.batch // options.accumulate)
    length = learnt.tokens.shape[1]
    share = learnt.learn.sum() / learnt.learn.size
    rows = [
        ("checkpoint", f"{checkpoint.folder}: {config.model_type}, {len(config.pattern)} layers, sorted"),
        ("training", f"{learnt.description}; {len(learnt)} used, {share:.0%} of their tokens count"),
        ("judged by", f"{len(judged)} held-out examples at rates {', '.join(f'{rate:g}' for rate in options.judged)}"),
        ("trained", f"{lora.described(options.rank)}, {trained / 1e6:.3g} M numbers for {frozen / 1e6:.4g} M weights"),
        (
            "steps",
            f"{options.planned_steps(len(learnt))} of {options.batch} x {length} tokens in {options.accumulate} "
            f"part(s), {options.compute}, learning rate {options.lr:.2g}, "
            f"on {mesh.size} x {jax.devices()[0].device_kind}",
        ),
        (
            "memory",
            f"about {console.format_bytes(memory_bytes(config, options))} a device for weights and optimizer",
        ),
        ("output", f"{out}, {checkpoint.bits} bits; until it is whole, {work_folder(out).name}"),
    ]
    return "\n".join(f"{name:<11} {text}" for name, text in rows)


def write(checkpoint: Checkpoint, out: str, result: recover.Result, options: RecoverySettings, overwrite: bool) -> None:
    """The checkpoint with merged weights, layer by layer, in the form of the one that was read."""
    dtype = np.float32 if checkpoint.bits == 32 else np.dtype(ml_dtypes.bfloat16)
    factors = jax.device_get(result.factors)
    note = {
        "version": __version__,
        "options": dataclasses.asdict(options),
        "steps": result.steps,
        "best_step": result.best_step,
        "loss_before": {f"{rate:g}": loss for rate, loss in result.before.items()},
        "loss_after": {f"{rate:g}": loss for rate, loss in result.after.items()},
    }
    provenance = {**checkpoint.meta.get("provenance", {}), "recovery": note}
    with staged_output(out, overwrite) as staging:
        check_space(staging, checkpoint.weight_bytes(0.0))
        writer = CheckpointWriter(staging, checkpoint.hf_config, checkpoint.meta | {"provenance": provenance})
        writer.add_top(checkpoint.top())
        for i in range(len(checkpoint.config.pattern)):
            layer = lora.merge_layer(i, checkpoint.layer(i), factors, options.alpha)
            table = {kind: elastic.BLOCKS[kind] for kind in layer}
            kept = {k: {n: stored(table[k][n], value, dtype) for n, value in b.items()} for k, b in layer.items()}
            writer.add_layer(i, {k: reachable_bias(checkpoint.config, k, block) for k, block in kept.items()})
        writer.finish(checkpoint.folder)


def finetune(
    checkpoint: Checkpoint,
    out: str,
    learnt: Examples,
    judged: Examples,
    options: RecoverySettings,
    *,
    overwrite: bool = False,
    progress: recover.Progress = lambda steps: steps,
    say: Callable[[str], object] = lambda text: None,
) -> recover.Result:
    """Train, merge and write `out`; work that is done stays in OUT.partial until then. Raises UserError."""
    assert checkpoint.plan is not None
    options = resolved(options, checkpoint.config)
    say(describe(checkpoint, out, options, learnt, judged))
    folder = work_folder(out)
    layers = [checkpoint.layer(i) for i in range(len(checkpoint.config.pattern))]
    try:
        result = recover.train(
            checkpoint.config, layers, checkpoint.top(), checkpoint.plan, learnt, judged, options, folder, progress
        )
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(f"no space left on the disk; free some and add --resume: {folder} is kept") from None
    write(checkpoint, out, result, options, overwrite)
    shutil.rmtree(folder, ignore_errors=True)
    return result


if __name__ == "__main__":
    from uniql_jax.commands import run

    run("finetune")
