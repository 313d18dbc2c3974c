"""Which size of a checkpoint fits a budget of bytes: a prune rate, or with nested bits a setting of the joint plan."""

from __future__ import annotations

import dataclasses

from uniql_jax.checkpoint import Checkpoint, Setting
from uniql_jax.console import format_bytes
from uniql_jax.errors import UserError
from uniql_jax.joint_plan import TOP
from uniql_jax.limits import MAX_PRUNE_RATE

STEPS = 350
"""Rates that are tried: every 0.001."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A size of a checkpoint: bytes of its weights, and its prune rate, or else a setting of the joint plan."""

    bytes: int
    rate: float = 0.0
    setting: Setting | None = None

    def keep(self, checkpoint: Checkpoint) -> tuple[dict[str, int], ...]:
        """Kept sizes of every layer."""
        setting = self.setting
        if setting is None:
            return checkpoint.keep(self.rate)
        return tuple({axis: setting[i, axis].entries for axis in whole} for i, whole in enumerate(checkpoint.keep(0.0)))

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
    count = plan.count(budget)
    return Choice(round(plan.bytes[count]), setting=plan.kept(count))


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
