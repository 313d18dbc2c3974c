"""Masked LoRA recovery from beginning to end: train at all prune rates at once, keep the best, merge.

Everything that a run needs to go on after a kill is in its work folder: factors, optimizer state, and the step, from
which rates, rows and dropout follow. A resumed run gives the same numbers, bit for bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from uniql_jax.config import ModelConfig
from uniql_jax.errors import UserError
from uniql_jax.plan import Plan
from uniql_jax.train import lora, rates, stack
from uniql_jax.train.examples import Examples, batch_rows, from_windows, split
from uniql_jax.train.loop import Trainer, resolved
from uniql_jax.train.lora import Factors
from uniql_jax.train.settings import RecoverySettings

LOG = "log.jsonl"
Progress = Callable[[Iterable[int]], Iterable[int]]


@dataclasses.dataclass(frozen=True)
class Result:
    """The best factors, validation loss per rate before and after (nats), and the steps that were made."""

    factors: Factors
    before: dict[float, float]
    after: dict[float, float]
    steps: int
    best_step: int


def fingerprint(
    config: ModelConfig,
    layers: Sequence[lora.Layer],
    plan: Plan,
    examples: Examples,
    validation: Examples,
    options: RecoverySettings,
) -> str:
    """Names a run: what it starts from and how; another one must not go on with its work."""
    digest = hashlib.sha256(repr((config, plan.digest, dataclasses.asdict(options))).encode())
    for layer in layers:
        for block in layer.values():
            for value in jax.tree.leaves(block):
                digest.update(np.ascontiguousarray(value[:1]).tobytes())  # enough to tell models apart
    for part in (examples, validation):
        for array in (part.tokens, part.valid, part.learn):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class Log:
    """A .jsonl file of losses; a resumed run takes back what came after the state that it goes on from."""

    def __init__(self, path: Path, step: int):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        path.write_text("".join(f"{line}\n" for line in kept))

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one line."""
        with self.path.open("a") as file:
            file.write(json.dumps(dict(entry)) + "\n")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # cut short by the kill
        return math.inf


class Saved:
    """The resumable state in a work folder, through orbax: the newest whole one is what counts."""

    def __init__(self, folder: Path, name: str):
        """Raises UserError when the folder belongs to another run."""
        import orbax.checkpoint as ocp  # slow to import

        self._args = ocp.args
        folder.mkdir(parents=True, exist_ok=True)
        note = folder / "run.json"
        if note.exists():
            if json.loads(note.read_text())["fingerprint"] != name:
                raise UserError(f"{folder} holds a run with other settings; remove it or repeat those settings")
        else:
            temporary = folder / "run.tmp"
            temporary.write_text(json.dumps({"fingerprint": name}))
            os.replace(temporary, note)
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(
            (folder / "state").absolute(), options=options, item_names=("arrays", "notes")
        )

    def save(self, step: int, arrays: Any, notes: Mapping[str, Any]) -> None:
        """Keep a state; a kill in the middle leaves the one before."""
        kept, noted = self._args.StandardSave(arrays), self._args.JsonSave(dict(notes))
        self._manager.save(step, args=self._args.Composite(arrays=kept, notes=noted))

    def load(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, arrays placed as those of `like`, notes) of the newest state, or None."""
        step = self._manager.latest_step()
        if step is None:
            return None
        kept, noted = self._args.StandardRestore(like), self._args.JsonRestore()
        found = self._manager.restore(step, args=self._args.Composite(arrays=kept, notes=noted))
        return step, found["arrays"], found["notes"]

    def close(self) -> None:
        """Let go of the folder."""
        self._manager.close()


def train(
    config: ModelConfig,
    layers: Sequence[lora.Layer],
    top: Mapping[str, Any],
    plan: Plan,
    examples: Examples,
    validation: Examples,
    options: RecoverySettings,
    folder: Path,
    progress: Progress = lambda steps: steps,
    trainer: Trainer | None = None,
    teacher: tuple[Sequence[lora.Layer], Mapping[str, Any]] | None = None,
) -> Result:
    """Train LoRA factors at rates drawn from `options.rates`; those with the best mean validation loss are returned.

    layers, top, teacher: as for Trainer, sorted, unpruned. The work folder is made, or gone on with. Raises UserError
    when it belongs to another run, and when the loss is no longer finite.
    """
    options = resolved(options, config)
    steps = options.total_steps(len(examples))
    saved = Saved(folder, fingerprint(config, layers, plan, examples, validation, options))
    try:
        trainer = trainer or Trainer(config, layers, top, options, steps, teacher=teacher)
        if options.adapt:
            rate_0: dict[str, Any] = dict(rates="0", validation_rates=(0.0,), distill=0.0)
            first = dataclasses.replace(options, adapt=0, steps=options.adapt, **rate_0)
            alone = trainer.variant(first, options.adapt)
            found = train(
                config, layers, top, plan, examples, validation, first, folder / "adapt", progress, alone, teacher
            )
            trainer.start_from(found.factors)
        return _run(trainer, plan, examples, validation, options, steps, saved, folder, progress)
    finally:
        saved.close()


def evaluations(options: RecoverySettings, steps: int, validation: int) -> int:
    """Evaluations of a run: as many as asked, but no more than cost what training does; one at least.

    A step is one forward and one backward pass over a batch, an evaluation a forward pass over all examples that judge,
    at each rate.
    """
    affordable = 3 * options.batch * steps // (validation * len(options.validation_rates))
    return max(1, min(options.evaluations, affordable))


def _run(
    trainer: Trainer,
    plan: Plan,
    examples: Examples,
    validation: Examples,
    options: RecoverySettings,
    steps: int,
    saved: Saved,
    folder: Path,
    progress: Progress,
) -> Result:
    batches = trainer.evaluation_batches(validation)
    keeps = {rate: rates.keep_arrays(plan, rate) for rate in {*rates.RATES, *options.validation_rates}}
    every = max(1, steps // evaluations(options, steps, len(validation)))

    def judge(factors: Factors) -> dict[float, float]:
        return {rate: trainer.evaluate(factors, batches, keeps[rate]) for rate in options.validation_rates}

    factors, state = trainer.init()
    best = factors
    found = saved.load({"factors": factors, "state": state, "best": best})
    if found is None:
        start, after = 0, judge(factors)
        before = judge(trainer.fresh()) if options.adapt else after
        notes: dict[str, Any] = {"before": list(before.values()), "after": list(after.values()), "best_step": 0}
        notes |= {"lowest": None, "bad": 0}
    else:
        start, arrays, notes = found
        factors, state, best = arrays["factors"], arrays["state"], arrays["best"]
    log = Log(folder / LOG, start)
    if found is None:
        log.write({"step": 0, "validation": _by_rate(options.validation_rates, notes["after"])})
    pending: list[tuple[int, float, Any]] = []
    bar = progress(range(start, steps))
    for i in bar:
        if notes["bad"] >= options.patience:
            break
        rate = rates.draw(options.rates, options.seed, i)
        rows = batch_rows(len(examples), options.batch, options.seed, i)
        batch = trainer.place(examples, rows, options.accumulate)
        # `best` may be the very buffers that the step consumes
        best = jax.tree.map(lambda x: x.copy(), best) if best is factors else best
        factors, state, loss = trainer.step(factors, state, batch, keeps[rate], i)
        pending.append((i + 1, rate, loss))
        if (i + 1) % every and i + 1 < steps:
            continue
        for step, seen, value in pending:  # waits here only, so that steps queue up in between
            if not math.isfinite(float(value)):
                raise UserError(f"the loss is {float(value)} at step {step}; a smaller --lr may help")
            log.write({"step": step, "rate": seen, "loss": float(value)})
        pending = []
        scores = judge(factors)
        log.write({"step": i + 1, "validation": _by_rate(options.validation_rates, scores.values())})
        mean = float(np.mean(list(scores.values())))
        if mean < np.mean(notes["after"]):
            best, notes = factors, notes | {"after": list(scores.values()), "best_step": i + 1}
        # While the learning rate is high a run may be worse than its start, which is no reason to end it.
        gained = notes["lowest"] is None or mean < notes["lowest"]
        notes = notes | ({"lowest": mean, "bad": 0} if gained else {"bad": notes["bad"] + 1})
        saved.save(i + 1, {"factors": factors, "state": state, "best": best}, notes)
        if hasattr(bar, "set_postfix_str"):
            text = ", ".join(f"{rate:g}: {score:.3f}" for rate, score in scores.items())
            bar.set_postfix_str(f"validation loss at {text}")  # pyright: ignore[reportAttributeAccessIssue]
    done = json.loads((folder / LOG).read_text().splitlines()[-1])["step"]
    before, after = (dict(zip(options.validation_rates, notes[name], strict=True)) for name in ("before", "after"))
    best = stack.unstack_factors(trainer.config, jax.device_get(best))
    return Result(best, before, after, int(done), int(notes["best_step"]))


def _by_rate(validation: Sequence[float], scores: Iterable[float]) -> dict[str, float]:
    return {f"{rate:g}": score for rate, score in zip(validation, scores, strict=True)}


def recover(
    config: ModelConfig,
    layers: Sequence[lora.Layer],
    top: Mapping[str, Any],
    plan: Plan,
    examples: Examples | Int[np.ndarray, "n t"],
    options: RecoverySettings | None = None,
    *,
    folder: str | Path,
    progress: Progress = lambda steps: steps,
) -> tuple[list[dict[str, dict[str, Any]]], Result]:
    """The layers with masked LoRA trained and merged in: between sorting and quantizing.

    layers, top: dense leaves, sorted and unpruned, in the layout of `elastic.BLOCKS`; examples: token windows int32
    [n, t] without padding, or `Examples`, of which a part is held out to judge by. `folder` keeps the work, and a
    killed run called again goes on with it. Returns merged layers (matrices float32) and what was gained.
    Raises UserError as `train` does, and for a single example.
    """
    options = options or RecoverySettings()
    known = examples if isinstance(examples, Examples) else from_windows(examples)
    train_split, validation = split(known, options.held_share, options.held_most, options.seed)
    result = train(config, layers, top, plan, train_split, validation, options, Path(folder), progress)
    host = jax.device_get(result.factors)
    return [lora.merge_layer(i, layer, host, options.alpha) for i, layer in enumerate(layers)], result
