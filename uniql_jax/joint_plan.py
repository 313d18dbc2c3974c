"""One order of what to give up for bytes: the last bit of a unit, or the unit, whichever loses least per byte.

A unit is a run of entries of one elastic axis of one layer, as in the plan of rates. Every unit loses its last bit
before it is dropped, and the units of an axis go from its end, so that at any budget an axis has a first part with all
bits, a second with the leading bits alone, and a rest that is not read. A smaller budget takes more steps of the same
order: what it keeps is a prefix of what a larger one keeps, in entries and in bits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from uniql_jax.plan import next_cut

TOP = -1
"""Layer of the pieces outside the layers, whose axis is the name of the leaf."""


class Piece(NamedTuple):
    """An axis of a layer, or a matrix that is not pruned.

    layer, axis: names of it, see TOP. size, unit: entries, and entries that go together. bit, rest: bytes that an
    entry's last bit holds, and all else of it. most: the largest fraction that may be dropped.
    """

    layer: int
    axis: str
    size: int
    unit: int
    bit: float
    rest: float
    most: float


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
    """The pieces of a model, the bytes of what none of them holds, and the steps from the cheapest to the dearest."""

    pieces: tuple[Piece, ...]
    other: float
    steps: tuple[Step, ...]

    @functools.cached_property
    def bytes(self) -> Float[np.ndarray, " _"]:
        """Bytes of the model after each number of steps."""
        kept = [Kept(piece.size, piece.size) for piece in self.pieces]
        total = [self.other + sum(piece.size * (piece.bit + piece.rest) for piece in self.pieces)]
        for step in self.steps:
            piece, before = self.pieces[step.piece], kept[step.piece]
            kept[step.piece] = after = _taken(piece, before, step.drop)
            saved = (before.full - after.full) * piece.bit + (before.entries - after.entries) * piece.rest
            total.append(total[-1] - saved)
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
    return JointPlan(tuple(pieces), other, tuple(step for *_, step in found))


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
