"""What launches pull into the cache for later ones: what is planned, and which bytes each program names."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import ahead, pointer
from pallas_kernels.ahead import Ahead, Budget, Pull, Span


def arrays(*sizes: int) -> list[Any]:
    """int32 arrays of so many numbers."""
    return [jnp.zeros(size, jnp.int32) for size in sizes]


def told(plan: list[Ahead], launches: list[list[Any]]) -> list[list[tuple[int, int, int, int]]]:
    """For each launch: (launch pulled for, array there, start, size)."""
    place = {id(array): (i, j) for i, each in enumerate(launches) for j, array in enumerate(each)}
    return [
        [(*place[id(array)], *span) for array, span in zip(each.arrays, each.pull.spans, strict=True)] for each in plan
    ]


def test_a_launch_pulls_what_the_next_reads_first() -> None:
    launches = [arrays(1024), arrays(2048), arrays(4096)]
    plan = ahead.plan(launches, [Budget(4096), Budget(1024, early=True)])
    assert told(plan, launches) == [[(1, 0, 0, 4096)], [(2, 0, 0, 1024)]]
    assert [each.pull.early for each in plan] == [False, True]


def test_what_was_pulled_is_not_pulled_again() -> None:
    launches = [arrays(64), [], arrays(4096), arrays(64)]
    plan = ahead.plan(launches, [Budget(4096), Budget(4096), Budget(0)])
    assert told(plan, launches) == [[(2, 0, 0, 4096)], [(2, 0, 4096, 4096)], []]


def test_arrays_of_one_launch_are_pulled_alike_far() -> None:
    launches = [[], arrays(3072, 1024)]
    assert told(ahead.plan(launches, [Budget(8192)]), launches) == [[(1, 0, 0, 6144), (1, 1, 0, 2048)]]


def test_a_budget_passes_over_the_end_of_a_launch() -> None:
    launches = [[], arrays(256), arrays(512), arrays(64)]
    assert told(ahead.plan(launches, [Budget(2048)]), launches) == [[(1, 0, 0, 1024), (2, 0, 0, 1024)]]


def test_nothing_is_pulled_at_the_end() -> None:
    assert ahead.plan([arrays(64)], [Budget(1 << 20)]) == [ahead.NOTHING]


@given(
    numbers=st.integers(32, 5000).map(lambda n: 4 * n),
    start=st.integers(0, 40),
    size=st.integers(1, 5000),
    programs=st.integers(1, 700),
)
def test_every_byte_of_a_span_is_named_and_none_beyond_the_array(
    numbers: int, start: int, size: int, programs: int
) -> None:
    start, size = start * ahead.LINE, size * 4
    size = min(size, 4 * numbers - start)
    if size <= 0:
        return
    ref = np.zeros(numbers, np.int32)
    seen = np.zeros(4 * numbers, bool)

    def note(ptx: str, _: Any, offset: Any) -> None:
        length = int(ptx.split("[a], ")[1].split(";")[0])
        assert length % 16 == 0
        if int(offset) >= 0:
            assert int(offset) % 16 == 0
            assert int(offset) + length <= 4 * numbers
            seen[int(offset) : int(offset) + length] = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pointer, "instruct", note)
        patch.setattr(jnp, "where", np.where)
        patch.setattr(jnp, "minimum", np.minimum)
        for program in range(programs):
            Pull((Span(start, size),))([ref], program, programs, early=False)
            Pull((Span(start, size),))([ref], program, programs, early=True)  # not its place
    assert seen[start : start + size].all()


@pytest.mark.gpu
def test_a_kernel_that_pulls_is_right_on_a_gpu() -> None:
    assert ahead._probed()
