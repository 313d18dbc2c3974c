"""One order of what to give up for bytes: the last bit of a unit, or the unit, whichever loses least per byte.

A unit is a run of entries of one elastic axis of one layer, as in the plan of rates. Every unit loses its last bit
before it is dropped, and the units of an axis go from its end, so that at any budget an axis has a first part with all
bits, a second with the leading bits alone, and a rest that is not read. A smaller budget takes more steps of the same
order: what it keeps is a prefix of what a larger one keeps, in entries and in bits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from uniql_jax import elastic
from uniql_jax.config import ModelConfig
from uniql_jax.plan import LAYER_CAP, Plan, next_cut

BIT, UNIT = "bit", "unit"
"""What a step takes, in a checkpoint's plan."""
TOP = -1
"""Layer of the pieces outside the layers, whose axis is the name of the leaf."""
TOP_UNITS, TOP_ALIGN = 16, 128
"""Units of embedding and head, of which a last bit goes at a time, and what their rows are a multiple of."""


class Piece(NamedTuple):
    """An axis of a layer, or a matrix that is not pruned.

    layer, axis: names of it, see TOP. size, unit: entries, and entries that go together. bit, rest: bytes that an
    entry's last bit holds, and all else of it. most: the largest fraction that may be dropped. spare_bit, spare_rest:
    bytes of padding, which go with the last unit's last bit, and with that unit.
    """

    layer: int
    axis: str
    size: int
    unit: int
    bit: float
    rest: float
    most: float
    spare_bit: float = 0.0
    spare_rest: float = 0.0

    @property
    def bytes(self) -> float:
        """All that it holds."""
        return self.size * (self.bit + self.rest) + self.spare_bit + self.spare_rest


class Kept(NamedTuple):
    """Entries that stay, and how many of them have all bits."""

    entries: int
    full: int


class Step(NamedTuple):
    """The next unit of a piece gives up its last bit (drop False) or its other bits and itself (drop True)."""

    piece: int
    drop: bool


@dataclasses.dataclass(frozen=True)
class JointPlan:
    """The pieces of a model, the bytes of what none of them holds, the steps from the cheapest to the dearest, and what
    each is estimated to lose.
    """

    pieces: tuple[Piece, ...]
    other: float
    steps: tuple[Step, ...]
    losses: tuple[float, ...] = ()

    @functools.cached_property
    def bytes(self) -> Float[np.ndarray, " _"]:
        """Bytes of the model after each number of steps."""
        kept = [Kept(piece.size, piece.size) for piece in self.pieces]
        total = [self.other + sum(piece.bytes for piece in self.pieces)]
        for step in self.steps:
            piece, before = self.pieces[step.piece], kept[step.piece]
            kept[step.piece] = after = _taken(piece, before, step.drop)
            total.append(total[-1] - _saved(piece, before, after))
        return np.asarray(total)

    def count(self, budget: float) -> int:
        """Steps that a budget in bytes asks for: the fewest that fit it.

        Raises:
            ValueError: even all steps leave more.
        """
        fits = np.flatnonzero(self.bytes <= budget)
        if not len(fits):
            raise ValueError(f"the smallest setting has {self.bytes[-1]:.0f} bytes, more than {budget:.0f}")
        return int(fits[0])

    def kept(self, count: int) -> dict[tuple[int, str], Kept]:
        """What stays of every piece after so many steps, by layer and axis."""
        kept = [Kept(piece.size, piece.size) for piece in self.pieces]
        for step in self.steps[:count]:
            kept[step.piece] = _taken(self.pieces[step.piece], kept[step.piece], step.drop)
        return {(piece.layer, piece.axis): one for piece, one in zip(self.pieces, kept, strict=True)}

    def to_json(self) -> dict[str, Any]:
        """Plain data for config.json: bytes before the first step and after each, and the loss of each."""
        names = [(piece.layer, piece.axis) for piece in self.pieces]
        top = [piece.unit for piece in self.pieces if piece.layer == TOP]
        return {
            "leading_bits": 3,
            "top_unit": max(top, default=1),
            "steps": [[*names[step.piece], UNIT if step.drop else BIT] for step in self.steps],
            "bytes": [round(size) for size in self.bytes.tolist()],
            "losses": list(self.losses),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], pieces: Sequence[Piece], other: float) -> JointPlan:
        """Inverse of `to_json`, for the pieces of the model and the bytes of the rest.

        Raises:
            ValueError: the steps do not fit the pieces, or the bytes are not theirs.
        """
        index = {(piece.layer, piece.axis): number for number, piece in enumerate(pieces)}
        steps = []
        kept = [Kept(piece.size, piece.size) for piece in pieces]
        for number, (layer, axis, what) in enumerate(data["steps"]):
            if (layer, axis) not in index:
                raise ValueError(f"step {number} names {axis!r} of layer {layer}, which the model lacks")
            step = Step(index[layer, axis], what == UNIT)
            piece, before = pieces[step.piece], kept[step.piece]
            kept[step.piece] = after = _taken(piece, before, step.drop)
            if after == before or after.full > after.entries:
                raise ValueError(f"step {number} takes what {axis!r} of layer {layer} has not")
            steps.append(step)
        if len(data["losses"]) != len(steps):
            raise ValueError(f"there are {len(steps)} steps and {len(data['losses'])} losses")
        plan = cls(tuple(pieces), other, tuple(steps), tuple(map(float, data["losses"])))
        if [round(size) for size in plan.bytes.tolist()] != data["bytes"]:
            raise ValueError("the bytes are not those of the steps")
        return plan


def _saved(piece: Piece, before: Kept, after: Kept) -> float:
    """Bytes that a step frees."""
    saved = (before.full - after.full) * piece.bit + (before.entries - after.entries) * piece.rest
    saved += piece.spare_bit * (before.full == piece.size > after.full)
    return saved + piece.spare_rest * (before.entries == piece.size > after.entries)


def _taken(piece: Piece, kept: Kept, drop: bool) -> Kept:
    if drop:
        return kept._replace(entries=next_cut(kept.entries, piece.unit))
    return kept._replace(full=_before(kept.full, piece.unit))


def _before(kept: int, unit: int) -> int:
    """The border before the last unit of what is kept; 0 before the first."""
    return max((kept - 1) // unit * unit, 0)


def make_joint_plan(
    pieces: Sequence[Piece],
    bit_losses: Sequence[Float[np.ndarray, " _"]],
    drop_losses: Sequence[Float[np.ndarray, " _"] | None],
    other: float = 0.0,
    drop_price: float = 1.0,
) -> JointPlan:
    """Order the steps of all pieces by loss per byte.

    Args:
        pieces: what can be given up.
        bit_losses: per piece, the loss at 0 ... size entries with all bits, the others with the leading bits alone.
        drop_losses: per piece, the loss at 0 ... size entries kept, the others gone; None: not pruned.
        other: bytes of what no piece holds.
        drop_price: factor on the losses of drops, where they are in another measure; infinite: bits alone.

    Returns:
        The plan. Within a piece no step is cheaper than what must go before it; where dropping a unit is cheaper, last
        bit included, than its last bit by itself, both cost what they cost together.
    """
    found: list[tuple[float, int, int, Step]] = []
    for index, piece in enumerate(pieces):
        bits, drops = np.asarray(bit_losses[index], np.float64), drop_losses[index]
        pruned = drops is not None and np.isfinite(drop_price)
        steps = _priced(piece, bits, np.asarray(drops, np.float64) * drop_price if pruned else None)
        found += [(price, index, place, Step(index, drop)) for place, (price, drop) in enumerate(steps)]
    found.sort(key=lambda one: one[:3])
    plan = JointPlan(tuple(pieces), other, tuple(step for *_, step in found))
    lost = [price * saved for (price, *_), saved in zip(found, -np.diff(plan.bytes), strict=True)]
    return dataclasses.replace(plan, losses=tuple(float(one) for one in lost))


def top_unit(vocab_size: int) -> int:
    """Rows of embedding and head whose last bit goes at once. The last go first: tokenizers number rare words last."""
    return -(-vocab_size // (TOP_UNITS * TOP_ALIGN)) * TOP_ALIGN


def pieces_of(config: ModelConfig, plan: Plan, groups: Mapping[str, int], unit_of_top: int) -> list[Piece]:
    """Every elastic axis of every layer, and embedding and head, with the bytes of nested codes.

    Args:
        config: the model.
        plan: its units.
        groups: weights that share a scale, by contracted dimension.
        unit_of_top: rows of embedding and head whose last bit goes at once.
    """
    found = []
    for layer, kinds in enumerate(config.pattern):
        for axis in elastic.layer_axes(config, kinds):
            leaves = [leaf for kind in kinds for leaf in elastic.leaves(config, kind).values() if leaf.axis == axis]
            each = [_entry_bytes(config, leaf, groups) for leaf in leaves]
            bit, rest, spare_bit, spare_rest = (sum(column) for column in zip(*each, strict=True))
            size, unit = plan.sizes[axis], plan.units[axis]
            found.append(Piece(layer, axis, size, unit, bit, rest, LAYER_CAP, spare_bit, spare_rest))
    for name in ("embed",) if config.tie_embeddings else ("embed", "head"):
        bit, rest, *_ = _entry_bytes(config, elastic.TOP[name], groups)
        found.append(Piece(TOP, name, config.vocab_size, unit_of_top, bit, rest, 0.0))
    return found


def _entry_bytes(
    config: ModelConfig, leaf: elastic.Leaf, groups: Mapping[str, int]
) -> tuple[float, float, float, float]:
    """Of an entry of the leading axis: bytes of the last bit and of all else, then those of padding."""
    shape = elastic.shape(config, leaf)
    if leaf.contract is None:
        return 0.0, 4.0 * math.prod(shape[1:]), 0.0, 0.0
    if leaf.contract == "last":
        group = groups["embed"]
        across = -(-shape[-1] // group)
        scales, bits = 2 * across * math.prod(shape[1:-1]), across * group * math.prod(shape[1:-1]) / 8
        return bits + scales, 3 * bits + scales, 0.0, 0.0
    group, width, features = groups[leaf.dims[0]], math.prod(shape[:-1]), shape[-1]
    inner, spare = math.prod(shape[1:-1]), -width % group
    scale = 2 / group
    return (
        inner * features * (1 / 8 + scale), inner * features * (3 / 8 + scale),
        spare * features * (1 / 8 + scale), spare * features * (3 / 8 + scale),
    )  # fmt: skip


def _priced(
    piece: Piece, bits: Float[np.ndarray, " _"], drops: Float[np.ndarray, " _"] | None
) -> list[tuple[float, bool]]:
    """(loss per byte, drop) of a piece's steps in an order in which they may be taken, prices never falling."""
    bit_prices, drop_prices = [], []
    kept, before_bit, before_drop = piece.size, 0.0, 0.0
    while kept > 0:
        after = _before(kept, piece.unit)
        count = kept - after
        bit = max((bits[after] - bits[kept]) / (count * piece.bit), before_bit)
        if drops is not None and after > 0 and piece.size - after <= piece.most * piece.size:
            loss = max(drops[after] - drops[kept], 0.0)
            own = (loss - bit * count * piece.bit) / (count * piece.rest)
            if own < bit:  # both together cost less per byte
                bit = max(loss / (count * (piece.bit + piece.rest)), before_bit)
                own = bit
            before_drop = max(own, before_drop, bit)
            drop_prices.append(before_drop)
        bit_prices.append(bit)
        kept, before_bit = after, bit
    merged: list[tuple[float, bool]] = []
    taken = 0
    for place, price in enumerate(bit_prices):
        # drops of units whose bit is gone already, where they cost no more than the next bit
        while taken < min(place, len(drop_prices)) and drop_prices[taken] <= price:
            merged.append((drop_prices[taken], True))
            taken += 1
        merged.append((price, False))
    merged += [(price, True) for price in drop_prices[taken : len(bit_prices)]]
    return merged
