"""The joint plan of bits and units: nested at every budget, exact in bytes, and best where losses are convex."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from uniql_jax.joint_plan import JointPlan, Piece, make_joint_plan
from uniql_jax.plan import next_cut


def curves(rng: np.random.Generator, size: int, convex: bool) -> np.ndarray:
    """A loss that falls to 0 as more entries are kept."""
    slopes = rng.exponential(size=size)
    slopes = np.sort(slopes)[::-1] if convex else slopes
    return np.concatenate([slopes[::-1].cumsum()[::-1], [0.0]]) / 10


def drawn(
    rng: np.random.Generator, convex: bool = False
) -> tuple[list[Piece], list[np.ndarray], list[np.ndarray | None]]:
    """Three axes, one of which no unit divides, and a matrix that is not pruned."""
    pieces = [
        Piece(0, "ffn", 12, 4, 1.0, 3.5, 0.85),
        Piece(0, "qk", 10, 4, 2.0, 7.0, 0.85),
        Piece(1, "ffn", 8, 2, 1.0, 3.5, 0.5),
        Piece(-1, "embed", 16, 16, 1.5, 5.0, 0.0),
    ]
    bits = [curves(rng, piece.size, convex) for piece in pieces]
    drops: list[np.ndarray | None] = [8 * curves(rng, piece.size, convex) for piece in pieces[:-1]]
    return pieces, bits, [*drops, None]


def check(plan: JointPlan) -> None:
    """Every setting holds a prefix of the one before it; bytes are those of what it keeps."""
    before = plan.kept(0)
    assert all(kept == (piece.size, piece.size) for kept, piece in zip(before.values(), plan.pieces, strict=True))
    for count in range(len(plan.steps) + 1):
        kept = plan.kept(count)
        size = plan.other
        for piece, now, then in zip(plan.pieces, kept.values(), before.values(), strict=True):
            assert 0 <= now.full <= now.entries
            assert now.full <= then.full
            assert now.entries <= then.entries
            assert 1 - now.entries / piece.size <= piece.most
            assert now.entries % piece.unit == 0 or now.entries == piece.size
            assert now.full % piece.unit == 0 or now.full == piece.size
            size += now.full * piece.bit + now.entries * piece.rest
        assert plan.bytes[count] == pytest.approx(size)
        before = kept
    assert (np.diff(plan.bytes) < 0).all()


@pytest.mark.parametrize("convex", [True, False])
def test_every_budget_keeps_a_prefix_of_a_larger_ones(rng: np.random.Generator, convex: bool) -> None:
    for _ in range(20):
        plan = make_joint_plan(*drawn(rng, convex), other=11.0)
        check(plan)
        assert all(kept.full == 0 for kept in plan.kept(len(plan.steps)).values())
        for budget in (plan.bytes[0], plan.bytes[0] - 1, plan.bytes[len(plan.bytes) // 2], plan.bytes[-1]):
            count = plan.count(budget)
            assert plan.bytes[count] <= budget
            assert count == 0 or plan.bytes[count - 1] > budget
        with pytest.raises(ValueError, match="smallest"):
            plan.count(plan.bytes[-1] - 1)


def test_bits_alone_and_units_alone(rng: np.random.Generator) -> None:
    pieces, bits, drops = drawn(rng)
    alone = make_joint_plan(pieces, bits, drops, drop_price=np.inf)
    check(alone)
    assert {step.drop for step in alone.steps} == {False}
    assert len(alone.steps) == 3 + 3 + 4 + 1
    none = make_joint_plan(pieces, bits, [None] * 4)
    assert none.steps == alone.steps


def test_where_losses_are_convex_no_other_setting_is_better(rng: np.random.Generator) -> None:
    """At each of the plan's own sizes, by brute force over every setting of two small pieces."""
    pieces = [Piece(0, "ffn", 4, 1, 1.0, 3.0, 0.85), Piece(1, "ffn", 4, 1, 2.0, 6.0, 0.85)]
    for _ in range(10):
        bits = [curves(rng, 4, True) for _ in pieces]
        # what a drop loses beyond the unit's bit is convex too, and dearer per byte
        drops: list[np.ndarray | None] = [value + 6 * curves(rng, 4, True) for value in bits]
        plan = make_joint_plan(pieces, bits, drops)

        def loss(setting: tuple[tuple[int, int], ...], bits: list = bits, drops: list = drops) -> float:
            return sum(
                drops[i][entries] + bits[i][full] - bits[i][entries] for i, (entries, full) in enumerate(setting)
            )

        each = [(entries, full) for entries in range(1, 5) for full in range(entries + 1)]
        every = [
            (sum(full * p.bit + entries * p.rest for p, (entries, full) in zip(pieces, two, strict=True)), loss(two))
            for two in itertools.product(each, each)
        ]
        for count, size in enumerate(plan.bytes):
            ours = loss(tuple((kept.entries, kept.full) for kept in plan.kept(count).values()))
            best = min(value for other, value in every if other <= size + 1e-9)
            assert ours <= best * (1 + 1e-9) + 1e-12


def test_units_are_those_of_the_plan_of_rates() -> None:
    """A drop is the cut that the plan of rates makes."""
    piece = Piece(0, "qk", 10, 4, 1.0, 3.0, 0.85)
    plan = make_joint_plan([piece], [np.arange(10, -1, -1.0)], [np.arange(10, -1, -1.0) * 3])
    sizes = sorted({plan.kept(count)[0, "qk"].entries for count in range(len(plan.steps) + 1)}, reverse=True)
    assert sizes == [10, next_cut(10, 4), next_cut(next_cut(10, 4), 4)]
