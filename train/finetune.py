"""Recovery of a sorted 16-bit checkpoint: masked LoRA trained at all prune rates, merged into one of the same form."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from uniql_jax import console, elastic
from uniql_jax.checkpoint import Checkpoint, open_checkpoint
from uniql_jax.checkpoint_writer import CheckpointWriter, reachable_bias, stored
from uniql_jax.errors import UserError
from uniql_jax.locking import hold_lock
from uniql_jax.outputs import check_output, check_space, output_path, staged_output
from uniql_jax.tokenizer import load_tokenizer
from uniql_jax.train import examples, lora, recover
from uniql_jax.train.examples import Examples
from uniql_jax.train.placement import data_mesh, memory_bytes
from uniql_jax.train.settings import RecoverySettings, resolved
from uniql_jax.train.stack import Lazy
from uniql_jax.train.work import RUN, check_work_folder, disk_errors, has_state, state_bytes
from uniql_jax.version import __version__


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
    target = output_path(out)
    return target.with_name(f"{target.name}.partial")


def refuse_early(ckpt: str, out: str, texts: Sequence[str], resume: bool, overwrite: bool) -> None:
    """Raise UserError for what stands in the way at `out`, before anything long begins.

    Args:
        ckpt: the checkpoint to train; neither it nor `out` may lie inside the other.
        out: folder to create.
        texts: what to train on and to validate with; none of it may lie inside `out`.
        resume: whether an unfinished run may be there.
        overwrite: whether a model folder may be there.
    """
    check_output(out, overwrite, ckpt, texts)
    check_work_folder(work_folder(out), resume)


def load_examples(
    checkpoint: Checkpoint,
    specs: Sequence[str],
    validation: Sequence[str] | None,
    length: int,
    count: int | None,
    options: RecoverySettings,
) -> tuple[Examples, Examples]:
    """(training set, validation set), read with the checkpoint's own tokenizer.

    Args:
        checkpoint: the one to be trained.
        specs: text and rows to train on.
        validation: text and rows to validate with; None: a part of the training examples is held out.
        length: tokens of an example.
        count: at most so many examples of each spec; None for all.
        options: seed, and the size of the validation set.

    Raises:
        UserError: a text cannot be used.
    """
    config, tokenizer = checkpoint.config, load_tokenizer(checkpoint.folder)
    if not 2 <= length <= config.max_position:
        raise UserError(f"--length must be from 2 to {config.max_position} tokens, the model's limit")
    end = config.eos_ids[0] if config.eos_ids else getattr(tokenizer, "eos_token_id", None)
    read: dict[str, Any] = {"vocab_size": config.vocab_size, "end": end, "seed": options.seed}
    training = examples.load(specs, tokenizer, length, count, **read)
    if validation:
        return training, examples.load(validation, tokenizer, length, options.held_most, **read)
    return examples.split(training, options.held_share, options.held_most, options.seed)


def describe(
    checkpoint: Checkpoint, out: str, options: RecoverySettings, training: Examples, validation: Examples
) -> str:
    """The plan: what will be trained on what, and what it takes."""
    config = checkpoint.config
    trained, frozen = lora.planned(config, options.rank)
    mesh = data_mesh(options.batch // options.accumulate)
    length = training.tokens.shape[1]
    share = training.learn.sum() / training.learn.size
    rows = [
        ("checkpoint", f"{checkpoint.folder}: {config.model_type}, {len(config.pattern)} layers, sorted"),
        ("training", f"{training.description}; {len(training)} used, {share:.0%} of their tokens count"),
        ("validation", f"{len(validation)} examples at rates {', '.join(f'{r:g}' for r in options.validation_rates)}"),
        ("trained", f"{lora.described(options.rank)}, {trained / 1e6:.3g} M numbers for {frozen / 1e6:.4g} M weights"),
        (
            "steps",
            f"{options.planned_steps(len(training))} of {options.batch} x {length} tokens in {options.accumulate} "
            f"part(s), {options.compute}, learning rate {options.lr:.2g}, "
            f"on {mesh.size} x {jax.devices()[0].device_kind}",
        ),
        (
            "memory",
            f"about {console.format_bytes(memory_bytes(config, options, length, mesh.size))} a device",
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
    provenance = {**(checkpoint.meta.get("provenance") or {}), "recovery": note}
    with staged_output(out, overwrite, checkpoint.folder) as staging:
        check_space(staging, checkpoint.weight_bytes(0.0))
        writer = CheckpointWriter(staging, checkpoint.hf_config, checkpoint.meta | {"provenance": provenance})
        writer.add_top(checkpoint.top())
        for i in range(len(checkpoint.config.pattern)):
            layer = lora.merge_layer(i, checkpoint.layer(i), factors, options.alpha)
            table = {kind: elastic.BLOCKS[kind] for kind in layer}
            kept = {
                k: {n: stored(table[k][n], value, dtype, f"layers.{i}.{k}.{n}") for n, value in b.items()}
                for k, b in layer.items()
            }
            writer.add_layer(i, {k: reachable_bias(checkpoint.config, k, block) for k, block in kept.items()})
        writer.finish(checkpoint.folder)


def finetune(
    checkpoint: Checkpoint,
    out: str,
    training: Examples,
    validation: Examples,
    options: RecoverySettings,
    *,
    overwrite: bool = False,
    progress: recover.Progress = lambda steps: steps,
    say: Callable[[str], object] = lambda text: None,
) -> recover.Result:
    """Train, merge and write `out`; finished work stays in OUT.partial, locked, until then.

    Raises:
        UserError: as `recover.train` does, and when another process works on the same output.
    """
    assert checkpoint.plan is not None
    options = resolved(options, checkpoint.config)
    say(describe(checkpoint, out, options, training, validation))
    folder = work_folder(out)
    config, plan, top = checkpoint.config, checkpoint.plan, checkpoint.top()
    layers = Lazy(checkpoint.layer, len(config.pattern))
    fresh = not (folder / RUN).exists()
    if fresh:  # what a started run still needs is less
        check_space(folder, state_bytes(config, options) + checkpoint.weight_bytes(0.0))
    with hold_lock(folder):
        try:
            result = recover.train(config, layers, top, plan, training, validation, options, folder, progress)
        except UserError:
            if fresh and not has_state(folder):  # there is nothing to go on from
                shutil.rmtree(folder, ignore_errors=True)
            raise
        try:
            with disk_errors(Path(out)):
                write(checkpoint, out, result, options, overwrite)
        except UserError as error:
            raise UserError(f"{error} (the trained state is kept in {folder}; --resume writes it)") from None
        shutil.rmtree(folder, ignore_errors=True)
    return result


if __name__ == "__main__":
    from uniql_jax.commands import run

    run("finetune")
