"""Which size of a checkpoint fits a budget of bytes: a prune rate, or with nested bits a setting of the joint plan."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from uniql_jax.checkpoint import Checkpoint, Setting
from uniql_jax.console import format_bytes
from uniql_jax.errors import UserError
from uniql_jax.joint_plan import TOP, Kept
from uniql_jax.limits import MAX_PRUNE_RATE

STEPS = 350
"""Rates that are tried: every 0.001."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A size of a checkpoint: bytes of its weights, and its prune rate, or else a setting of the joint plan.

    Two of one checkpoint are equal where rate and `steps` are. `steps`: how many of the plan a setting takes.
    `left_out`: the fraction of the prunable parameters that it leaves out.
    """

    bytes: int = dataclasses.field(compare=False)
    rate: float = 0.0
    setting: Setting | None = dataclasses.field(default=None, compare=False)
    steps: int | None = None
    left_out: float = dataclasses.field(default=0.0, compare=False)

    @property
    def shown_rate(self) -> float:
        """The prune rate, or of a setting the fraction of the prunable parameters that it leaves out."""
        return self.rate if self.setting is None else self.left_out

    @property
    def label(self) -> str:
        """Short, for names and metrics."""
        return f"rate-{self.rate:g}" if self.steps is None else f"steps-{self.steps}"

    def kept(self, checkpoint: Checkpoint) -> tuple[dict[str, Kept], ...]:
        """Kept entries of every axis of every layer, and how many of them have all bits."""
        if self.setting is None:
            return tuple({axis: Kept(n, n) for axis, n in layer.items()} for layer in checkpoint.keep(self.rate))
        setting = self.setting
        return tuple({axis: setting[i, axis] for axis in whole} for i, whole in enumerate(checkpoint.keep(0.0)))

    def kept_top(self, checkpoint: Checkpoint, name: str) -> Kept:
        """The same of a leaf outside the layers."""
        whole = checkpoint.config.vocab_size
        return (self.setting or {}).get((TOP, name), Kept(whole, whole))

    def keep(self, checkpoint: Checkpoint) -> tuple[dict[str, int], ...]:
        """Kept sizes of every layer."""
        return tuple({axis: one.entries for axis, one in layer.items()} for layer in self.kept(checkpoint))

    def kept_fraction(self, checkpoint: Checkpoint) -> float:
        """Prunable parameters that stay, over all prunable parameters."""
        plan = checkpoint.plan
        if plan is None:
            return 1.0
        if self.setting is None:
            return plan.kept_fraction(self.rate)
        layers = zip(self.keep(checkpoint), plan.costs, strict=True)
        return sum(kept[axis] * cost for kept, costs in layers for axis, cost in costs.items()) / plan.total

    def __str__(self) -> str:
        if self.setting is None:
            return f"prune rate {self.rate:g}"
        inside = [kept for (layer, _), kept in self.setting.items() if layer != TOP]
        entries = sum(kept.entries for kept in inside)
        full = sum(kept.full for kept in inside)
        return f"{full / max(entries, 1):.0%} of the kept entries at 4 bits, the others at 3"


def rate_size(checkpoint: Checkpoint, rate: float) -> Choice:
    """A checkpoint at a prune rate. Raises UserError for one that was never sorted, at rates above 0."""
    return Choice(checkpoint.weight_bytes(rate), rate)


def setting_size(checkpoint: Checkpoint, steps: int) -> Choice:
    """A checkpoint of nested bits after so many steps of its joint plan."""
    plan = checkpoint.joint_plan
    assert plan is not None
    found = Choice(round(plan.bytes[steps]), setting=plan.kept(steps), steps=steps)
    return dataclasses.replace(found, left_out=round(1 - found.kept_fraction(checkpoint), 6))


class Sizes(Sequence[Choice]):
    """All sizes that a budget chooses from, the largest first: rates by a thousandth, or settings of the joint plan."""

    def __init__(self, checkpoint: Checkpoint, rates: bool = False):
        """Nothing is made yet. rates: of a checkpoint of nested bits, too, take its rates."""
        self._checkpoint = checkpoint
        self._joint = None if rates else checkpoint.joint_plan
        self._made = functools.lru_cache(64)(self._make)

    def __len__(self) -> int:
        if self._joint is not None:
            return len(self._joint.steps) + 1
        return STEPS + 1 if self._checkpoint.plan is not None else 1

    def __getitem__(self, index: int) -> Choice:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._made(index)

    def _make(self, index: int) -> Choice:
        if self._joint is not None and index:
            return setting_size(self._checkpoint, index)
        return rate_size(self._checkpoint, round(index * MAX_PRUNE_RATE / STEPS, 6))


def choose(checkpoint: Checkpoint, budget: int) -> Choice:
    """The largest size whose weights fit a budget.

    Args:
        checkpoint: the opened checkpoint.
        budget: bytes.

    Returns:
        Rate 0 where it fits; else the fewest steps of the joint plan that do, or the least prune rate to a thousandth.

    Raises:
        UserError: not even the smallest size fits; says what that takes.
    """
    if checkpoint.joint_plan is None:
        rate = rate_for_budget(checkpoint, budget)
        return Choice(checkpoint.weight_bytes(rate), rate)
    whole = checkpoint.weight_bytes(0.0)
    if whole <= budget:
        return Choice(whole)
    plan = checkpoint.joint_plan
    if plan.bytes[-1] > budget:
        least = format_bytes(round(plan.bytes[-1]))
        raise UserError(f"{format_bytes(budget)} is too little: the weights of the smallest size take {least}")
    return setting_size(checkpoint, plan.count(budget))


def rate_for_budget(checkpoint: Checkpoint, budget: int) -> float:
    """The smallest prune rate whose weights fit `budget` bytes, to a thousandth.

    Raises UserError when not even the highest does.
    """
    limit = MAX_PRUNE_RATE if checkpoint.plan else 0.0
    least = checkpoint.weight_bytes(limit)
    if least > budget:
        raise UserError(
            f"{format_bytes(budget)} is too little: the weights take {format_bytes(least)} at prune rate {limit:g}"
        )
    low, high = 0, STEPS  # sizes fall with the rate, so halving finds the first that fits
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if checkpoint.weight_bytes(middle * limit / STEPS) <= budget else (middle + 1, high)
    return round(low * limit / STEPS, 6)
