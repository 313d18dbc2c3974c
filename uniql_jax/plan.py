"""From one global prune rate to the kept sizes of every layer: nested, exact in parameters, any rate from 0 to 0.35.

The plan is a single order in which units (a few channels, pairs or ranks of one layer) are given up. A rate is a
prefix of that order, so what a higher rate keeps is always part of what a lower one keeps.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from uniql_jax import elastic
from uniql_jax.config import ModelConfig
from uniql_jax.errors import UserError
from uniql_jax.limits import MAX_PRUNE_RATE
from uniql_jax.weights.quantized import TARGET_GROUP, group_size

LAYER_CAP = 0.85
"""No layer gives up more than this part of an axis (UniQL, arXiv 2512.03383, section on layer-wise rates)."""


def check_rate(rate: float) -> float:
    """The rate itself, or a UserError when it is not a number from 0 to 0.35."""
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not -1e-9 <= rate <= MAX_PRUNE_RATE + 1e-9:
        raise UserError(f"prune rate must be a number from 0 to {MAX_PRUNE_RATE}, not {repr(rate)[:60]}")
    return min(max(0.0, float(rate)), MAX_PRUNE_RATE)  # this order makes 0.0 of -0.0, too


def group_and_unit(count: int, inner: int, least: int) -> tuple[int, int]:
    """(quantization group, cut unit) along an elastic axis of `count` entries whose entry spans `inner` inputs.

    A group is a whole number of entries, a multiple of 8 inputs, near 128 and small enough for eight cuts; a unit is
    a whole number of groups and at least `least` entries where that leaves eight units.

    Args:
        count: entries of the axis.
        inner: contracted inputs that one entry spans.
        least: entries that a unit should have at least.

    Returns:
        The group in inputs and the unit in entries.
    """
    target = min(TARGET_GROUP, max(8, count * inner // 8))
    step = 8 // math.gcd(8, inner)
    even = [k for k in range(step, count + 1, step) if count % k == 0] or [max(step, target // inner // step * step)]
    entries = min(even, key=lambda k: abs(math.log(k * inner / target)))
    smallest = min(least, max(1, count // 8))
    unit = entries * max(1, math.ceil(smallest / entries))
    return entries * inner, unit


PORTABLE = (128, 64, 32)
"""Group sizes that other runtimes take, along a dimension that no dimension of heads interleaves."""
INSIDE_HEAD = 32
"""Group size inside a head: one that every runtime takes."""


class AxisLayout(NamedTuple):
    """How the leaf that contracts an axis is grouped, and how the axis is cut.

    `group` counts contracted inputs where `run` is 1, else entries of the axis in one head (weights/runs.py); 0 where
    no leaf contracts the axis. `unit` counts entries of the axis.
    """

    group: int
    unit: int
    run: int = 1


def axis_layout(config: ModelConfig, axis: str, portable: bool = False) -> AxisLayout:
    """Groups of the leaf that contracts this elastic axis, and the unit in which the axis is cut.

    Q, K, B and C contract no elastic axis: they are cut by 16 dimensions (8 pairs), or fewer where an axis is short.

    Args:
        config: the model.
        axis: the elastic axis.
        portable: group as other runtimes can, where the sizes allow it: inside a head, and by 128, 64 or 32.
    """
    full = elastic.sizes(config)
    if axis in ("qk", "qk_pass", "ssm_state"):
        pair = full["pair"] if axis == "qk" else 1
        return AxisLayout(0, min(16 // pair, max(1, full[axis] // 8)))
    least = 16 if axis == "vo" else 8
    if axis not in ("vo", "ssm_head"):
        group, unit = group_and_unit(full[axis], 1, least)
        found = [size for size in PORTABLE if full[axis] % size == 0 and size <= max(group, INSIDE_HEAD)]
        if not portable or not found or group in found:
            return AxisLayout(group, unit)
        return AxisLayout(found[0], found[0])
    if portable and full[axis] % INSIDE_HEAD == 0:
        unit = max(8, min(least, full[axis] // 8 // 8 * 8))
        return AxisLayout(INSIDE_HEAD, unit, unit)
    return AxisLayout(*group_and_unit(full[axis], full[{"vo": "head", "ssm_head": "mamba_head"}[axis]], least))


def grouping(config: ModelConfig, portable: bool = False) -> Mapping[str, Mapping[str, int]]:
    """What a checkpoint says of its groups.

    Args:
        config: the model.
        portable: see `axis_layout`.

    Returns:
        `groups`: quantization group per contracted dimension, along the hidden size and each elastic axis; and, where
        a run is longer than 1, `runs` by elastic axis.
    """
    axes = sorted({axis for kinds in config.pattern for axis in elastic.layer_axes(config, kinds)})
    found = {axis: axis_layout(config, axis, portable) for axis in axes}
    embed = next((size for size in PORTABLE if portable and config.hidden_size % size == 0), None)
    groups = {"embed": embed or group_size(config.hidden_size)}
    groups |= {axis: layout.group for axis, layout in found.items() if layout.group}
    runs = {axis: layout.run for axis, layout in found.items() if layout.run > 1}
    return {"groups": groups} | ({"runs": runs} if runs else {})


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What to give up first: `order` lists (layer, axis) units from the first cut to the last.

    `sizes` and `units` are per axis; `costs[layer][axis]` is the number of parameters one entry holds.
    """

    sizes: Mapping[str, int]
    units: Mapping[str, int]
    costs: tuple[Mapping[str, int], ...]
    order: tuple[tuple[int, str], ...]

    @functools.cached_property
    def digest(self) -> str:
        """Names the plan's content; equal plans compare and hash equal, so a jit cache survives a reload."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and (self is other or self.digest == other.digest)

    def __hash__(self) -> int:
        return hash(self.digest)

    @functools.cached_property
    def total(self) -> int:
        """Prunable parameters at rate 0."""
        return sum(self.sizes[axis] * cost for layer in self.costs for axis, cost in layer.items())

    @functools.cached_property
    def _removed(self) -> np.ndarray:
        """Parameters removed after each prefix of the order, [units + 1]."""
        kept = {axis: cut_sizes(size, self.units[axis]) for axis, size in self.sizes.items()}
        rest = {
            (layer, axis): iter([cost * (size - after) for size, after in itertools.pairwise(kept[axis])])
            for layer, costs in enumerate(self.costs)
            for axis, cost in costs.items()
        }
        return np.cumsum([0, *(next(rest[unit], 0) for unit in self.order)])

    def _cuts(self, rate: float) -> int:
        return int(np.argmin(np.abs(self._removed - check_rate(rate) * self.total)))

    def keep(self, rate: float) -> tuple[dict[str, int], ...]:
        """Kept size of every axis of every layer at this prune rate.

        The removed fraction is the nearest the units allow.

        Raises:
            UserError: the rate is outside 0 ... 0.35.
        """
        cuts = collections.Counter(self.order[: self._cuts(rate)])
        kept = {axis: cut_sizes(size, self.units[axis]) for axis, size in self.sizes.items()}
        return tuple(
            {axis: kept[axis][: cuts[i, axis] + 1][-1] for axis in layer} for i, layer in enumerate(self.costs)
        )

    def keep_from(self, have: float, want: float) -> tuple[dict[str, int], ...]:
        """Kept sizes at rate `want` for a model that was already cut to rate `have`; it cannot grow back."""
        if check_rate(want) < have - 1e-9:
            raise UserError(f"the model was loaded at prune rate {have}; load it again to go down to {want}")
        return self.keep(want)

    def kept_fraction(self, rate: float) -> float:
        """Prunable parameters that stay, over all prunable parameters."""
        return float(1.0 - self._removed[self._cuts(rate)] / self.total)

    def to_json(self) -> dict[str, Any]:
        """Plain data for config.json."""
        return {
            "sizes": dict(self.sizes),
            "units": dict(self.units),
            "costs": [dict(c) for c in self.costs],
            "order": [[layer, axis] for layer, axis in self.order],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Inverse of `to_json`."""
        return cls(
            sizes={axis: int(size) for axis, size in data["sizes"].items()},
            units={axis: int(unit) for axis, unit in data["units"].items()},
            costs=tuple({axis: int(cost) for axis, cost in layer.items()} for layer in data["costs"]),
            order=tuple((int(layer), str(axis)) for layer, axis in data["order"]),
        )


def next_cut(kept: int, unit: int) -> int:
    """Size after one more cut: the next multiple of the unit below, never zero."""
    return max((kept - 1) // unit * unit, min(kept, unit))


@functools.cache
def cut_sizes(size: int, unit: int) -> tuple[int, ...]:
    """Every size that an axis may have, from the full one down."""
    found = [size]
    while (after := next_cut(found[-1], unit)) < found[-1]:
        found.append(after)
    return tuple(found)


def make_plan(
    config: ModelConfig,
    influence: Sequence[float] | None,
    *,
    losses: Sequence[Mapping[str, Sequence[float]]] | None = None,
    epsilon: float = 0.1,
    cap: float = LAYER_CAP,
    portable: bool = False,
) -> Plan:
    """Order all units by the global rate at which their layer's share crosses them.

    A layer's share is proportional to softmax(-influence / epsilon); a layer that reached `cap` stops, and the others
    go on, which redistributes what was clamped (method: plan).

    Args:
        config: the model.
        influence: block influence per layer, 1 - mean cos(input, output), float [layers]; None plans uniformly.
        losses: per layer and axis, the estimated loss of keeping 0 ... all entries of the axis; when given, units go
            in the order of loss per parameter, each at least as dear as the one before it on its axis.
        epsilon: temperature of the softmax.
        cap: largest fraction of a layer that may be removed.
        portable: see `axis_layout`.

    Returns:
        The plan, which holds the units of every rate up to the highest.
    """
    count = len(config.pattern)
    scores = np.zeros(count) if influence is None else np.asarray(influence, np.float64)
    if scores.shape != (count,) or not np.isfinite(scores).all():
        raise ValueError(f"block influence must be {count} finite numbers")
    weight = np.exp(-(scores - scores.min()) / epsilon)
    weight /= weight.mean()
    full = elastic.sizes(config)
    costs = {
        kinds: {axis: elastic.axis_cost(config, kinds, axis) for axis in elastic.layer_axes(config, kinds)}
        for kinds in set(config.pattern)
    }
    units = {axis: axis_layout(config, axis, portable).unit for axis in sorted({a for c in costs.values() for a in c})}
    crossings = []
    for layer, kinds in enumerate(config.pattern):
        for axis, cost in costs[kinds].items():
            price = 0.0
            for kept, after in itertools.pairwise(cut_sizes(full[axis], units[axis])):
                share = (full[axis] - (kept + after) / 2) / full[axis]
                if share > cap:
                    break
                if losses is None:
                    price = share / weight[layer]
                else:
                    curve = losses[layer][axis]
                    price = max(price, (curve[after] - curve[kept]) / (cost * (kept - after)))
                crossings.append((price, layer, axis))
    crossings.sort(key=lambda c: c[0])
    return Plan(
        sizes={axis: full[axis] for axis in units},
        units=units,
        costs=tuple(dict(costs[kinds]) for kinds in config.pattern),
        order=tuple((layer, axis) for _, layer, axis in crossings),
    )
