"""Masked LoRA recovery from beginning to end: train at all prune rates at once, keep the best, merge.

Everything that a run needs to go on after a kill is in its work folder: factors, optimizer state, and the step, from
which rates, rows and dropout follow. A resumed run gives the same numbers, bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from uniql_jax.config import ModelConfig
from uniql_jax.errors import UserError
from uniql_jax.locking import hold_lock
from uniql_jax.manifest import Manifest
from uniql_jax.plan import Plan
from uniql_jax.train import lora, rates, stack
from uniql_jax.train.examples import Examples, batch_rows, from_windows, split
from uniql_jax.train.loop import Trainer
from uniql_jax.train.lora import Factors
from uniql_jax.train.settings import RecoverySettings, resolved
from uniql_jax.train.work import LOG, Log, Saved, disk_errors, manifest
from uniql_jax.transfer import to_host

Progress = Callable[[Iterable[int]], Iterable[int]]


@dataclasses.dataclass(frozen=True)
class Result:
    """The best factors, the validation loss per rate before and after (nats), and the steps that were made."""

    factors: Factors
    before: dict[float, float]
    after: dict[float, float]
    steps: int
    best_step: int


def train(
    config: ModelConfig,
    layers: Sequence[lora.Layer],
    top: Mapping[str, Any],
    plan: Plan,
    training: Examples,
    validation: Examples,
    options: RecoverySettings,
    folder: Path,
    progress: Progress = lambda steps: steps,
    trainer: Trainer | None = None,
    teacher: tuple[Sequence[lora.Layer], Mapping[str, Any]] | None = None,
    made_from: Manifest | None = None,
) -> Result:
    """Train LoRA factors at rates drawn from `options.rates`; the best at the validation rates, on average, are
    returned.

    Args:
        config: of the model.
        layers: dense leaves as for Trainer, sorted, unpruned.
        top: embedding, norm and head, as for Trainer.
        plan: what each rate keeps.
        training: examples to train on.
        validation: examples to validate on.
        options: settings of the run.
        folder: work folder, made, or gone on with; whoever calls holds its lock (`hold_lock`).
        progress: wraps the steps of each part of the run.
        trainer: one that is compiled already.
        teacher: layers and top to distill from, where that is not the unpruned model itself.
        made_from: what all of these follow from, where the caller knows; else every tensor is read and hashed.

    Raises:
        UserError: the folder belongs to another run, nothing in the examples counts, the loss is no longer finite,
            or the disk cannot be written.
    """
    for part in (training, validation):
        if not part.learn[:, 1:].any():
            raise UserError(f"{part.description}: no token in it is to be predicted; name other text")
    options = resolved(options, config)
    steps = options.total_steps(len(training))
    made_from = made_from or manifest(config, layers, top, plan, training, validation, options, teacher)
    saved = Saved(folder, made_from)
    try:
        trainer = trainer or Trainer(config, layers, top, options, steps, teacher=teacher)
        if options.adapt:
            rate_0: dict[str, Any] = dict(rates="0", validation_rates=(0.0,), distill=0.0)
            first = dataclasses.replace(options, adapt=0, steps=options.adapt, **rate_0)
            alone = trainer.variant(first, options.adapt)
            found = train(
                config, layers, top, plan, training, validation, first, folder / "adapt", progress, alone, teacher,
                made_from,
            )  # fmt: skip
            trainer.start_from(found.factors)
        return _Run(trainer, plan, training, validation, options, steps, saved).go(progress)
    finally:
        saved.close()


def evaluations(options: RecoverySettings, steps: int, examples: int) -> int:
    """Evaluations of a run: as many as asked, but no more than cost a third of what training does; one at least.

    A step is one forward and one backward pass over a batch, an evaluation a forward pass over all examples of the
    validation set, in batches as large as a step's parts, at each rate.
    """
    rows = options.batch // options.accumulate
    affordable = options.batch * steps // (-(-examples // rows) * rows * len(options.validation_rates))
    return max(1, min(options.evaluations, affordable))


class _Run:
    """One training run: its state, and what is noted of it (all that a resumed run needs)."""

    def __init__(
        self,
        trainer: Trainer,
        plan: Plan,
        training: Examples,
        validation: Examples,
        options: RecoverySettings,
        steps: int,
        saved: Saved,
    ):
        self.trainer, self.training, self.options, self.steps, self.saved = trainer, training, options, steps, saved
        self.batches = trainer.evaluation_batches(validation)
        self.keeps = {rate: rates.keep_arrays(plan, rate) for rate in {*rates.RATES, *options.validation_rates}}
        self.every = max(1, steps // evaluations(options, steps, len(validation)))
        self.factors, self.state = trainer.init()
        self.best = to_host(self.factors)  # devices have better use for their memory
        found = saved.load({"factors": self.factors, "state": self.state, "best": self.best})
        if found is None:
            self.start, after = 0, self.validate(self.factors)
            before = self.validate(trainer.fresh()) if options.adapt else after
            self.notes: dict[str, Any] = {"before": before, "after": after, "best_step": 0, "lowest": None, "bad": 0}
        else:
            self.start, arrays, self.notes = found
            self.factors, self.state, self.best = arrays["factors"], arrays["state"], arrays["best"]
        self.saved_at, self.saving = -math.inf, 0.0  # when a state was saved last, and how long that took, seconds
        with disk_errors(saved.folder):
            self.log = Log(saved.folder / LOG, -1 if found is None else self.start)
            if found is None:
                self.log.write({"step": 0, "validation": self._by_rate(self.notes["after"])})

    def validate(self, factors: Factors) -> list[float]:
        """Validation loss at each of the validation rates, nats."""
        return [self.trainer.evaluate(factors, self.batches, self.keeps[r]) for r in self.options.validation_rates]

    def go(self, progress: Progress) -> Result:
        """Make the steps that are left."""
        pending: list[tuple[int, float, Any]] = []
        bar = progress(range(self.start, self.steps))
        for i in bar:
            if self.notes["bad"] >= self.options.patience:
                break
            pending.append(self._step(i))
            if (i + 1) % self.every and i + 1 < self.steps:
                continue
            scores = self._keep(i + 1, pending)
            pending = []
            if hasattr(bar, "set_postfix_str"):
                text = ", ".join(f"{rate}: {score:.3f}" for rate, score in self._by_rate(scores).items())
                bar.set_postfix_str(f"validation loss at {text}")  # pyright: ignore[reportAttributeAccessIssue]
        measured = self.options.validation_rates
        by_rate = {name: dict(zip(measured, self.notes[name], strict=True)) for name in ("before", "after")}
        best = stack.unstack_factors(self.trainer.config, self.best)
        return Result(best, **by_rate, steps=self.log.last, best_step=int(self.notes["best_step"]))

    def _step(self, i: int) -> tuple[int, float, Any]:
        """One update; its number, rate and loss, which is still on the device so that steps queue up."""
        options, trainer = self.options, self.trainer
        rate = rates.draw(options.rates, options.seed, i)
        rows = batch_rows(len(self.training), options.batch, options.seed, i)
        batch = trainer.place(self.training, rows, options.accumulate)
        self.factors, self.state, loss = trainer.step(self.factors, self.state, batch, self.keeps[rate], i)
        return i + 1, rate, loss

    def _keep(self, step: int, pending: Sequence[tuple[int, float, Any]]) -> list[float]:
        """Log the losses since the last time, validate, and save the state."""
        with disk_errors(self.saved.folder):
            for number, rate, value in pending:
                if not math.isfinite(float(value)):
                    raise UserError(f"the loss is {float(value)} at step {number}; a smaller --lr may help")
                self.log.write({"step": number, "rate": rate, "loss": float(value)})
            scores = self.validate(self.factors)
            self.log.write({"step": step, "validation": self._by_rate(scores)})
        mean = float(np.mean(scores))
        if mean < np.mean(self.notes["after"]):
            self.best = to_host(self.factors)
            self.notes |= {"after": scores, "best_step": step}
        # While the learning rate is high a run may be worse than its start, which is no reason to end it.
        gained = self.notes["lowest"] is None or mean < self.notes["lowest"]
        self.notes |= {"lowest": mean, "bad": 0} if gained else {"bad": self.notes["bad"] + 1}
        self._save(step)
        return scores

    def _save(self, step: int) -> None:
        """Save the state, always when the run is over; before that, so that it takes about a tenth of the time."""
        begun = time.monotonic()
        over = step >= self.steps or self.notes["bad"] >= self.options.patience
        if not over and begun - self.saved_at < 9 * self.saving:
            return
        self.saved.save(step, {"factors": self.factors, "state": self.state, "best": self.best}, self.notes)
        self.saved_at = time.monotonic()
        self.saving = self.saved_at - begun

    def _by_rate(self, scores: Iterable[float]) -> dict[str, float]:
        return {f"{rate:g}": score for rate, score in zip(self.options.validation_rates, scores, strict=True)}


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
    [n, t] without padding, or `Examples`, of which a part is held out for validation. `folder` keeps the work,
    locked while this runs, and a killed run called again goes on with it. Returns merged layers (matrices float32) and
    what was gained.
    Raises UserError as `train` does, and for a single example.
    """
    options = options or RecoverySettings()
    known = examples if isinstance(examples, Examples) else from_windows(examples)
    training, validation = split(known, options.held_share, options.held_most, options.seed)
    with hold_lock(folder):
        result = train(config, layers, top, plan, training, validation, options, Path(folder), progress)
    host = jax.device_get(result.factors)
    return [lora.merge_layer(i, layer, host, options.alpha) for i, layer in enumerate(layers)], result
