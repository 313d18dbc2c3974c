"""What launches pull into the cache for later ones: what is planned, and which bytes each program names."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_decode_fused import model_of
from uniql_jax.model.layers import fused
from uniql_jax.pallas_kernels import ahead, compat, pointer
from uniql_jax.pallas_kernels.ahead import Ahead, Budget, Pull, Span


def arrays(*sizes: int) -> list[Any]:
    """int32 arrays of so many numbers."""
    return [jnp.zeros(size, jnp.int32) for size in sizes]


def copies(plan: list[Ahead], launches: list[list[Any]]) -> list[list[tuple[int, int, int, int]]]:
    """For each launch: (launch pulled for, array there, start, size)."""
    place = {id(array): (i, j) for i, each in enumerate(launches) for j, array in enumerate(each)}
    return [
        [(*place[id(array)], *span) for array, span in zip(each.arrays, each.pull.spans, strict=True)] for each in plan
    ]


def test_a_launch_pulls_what_the_next_reads_first() -> None:
    launches = [arrays(1024), arrays(2048), arrays(4096)]
    plan = ahead.plan(launches, [Budget(4096), Budget(1024, early=True)])
    assert copies(plan, launches) == [[(1, 0, 0, 4096)], [(2, 0, 0, 1024)]]
    assert [each.pull.early for each in plan] == [False, True]


def test_what_was_pulled_is_not_pulled_again() -> None:
    launches = [arrays(64), [], arrays(4096), arrays(64)]
    plan = ahead.plan(launches, [Budget(4096), Budget(4096), Budget(0)])
    assert copies(plan, launches) == [[(2, 0, 0, 4096)], [(2, 0, 4096, 4096)], []]


def test_arrays_of_one_launch_are_pulled_alike_far() -> None:
    launches = [[], arrays(3072, 1024)]
    assert copies(ahead.plan(launches, [Budget(8192)]), launches) == [[(1, 0, 0, 6144), (1, 1, 0, 2048)]]


def test_a_budget_passes_over_the_end_of_a_launch() -> None:
    launches = [[], arrays(256), arrays(512), arrays(64)]
    assert copies(ahead.plan(launches, [Budget(2048)]), launches) == [[(1, 0, 0, 1024), (2, 0, 0, 1024)]]


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


def test_the_instruction_is_in_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowered for a GPU, where none is: the Triton backend takes what `pointer` gives it, and leaves nothing out."""
    if compat.plgpu is None or not pointer.PRESENT:
        pytest.skip("this JAX has no Triton backend that `pointer` knows")
    monkeypatch.setattr(compat, "interpreted", lambda: False)
    arguments = jnp.zeros(32), jnp.zeros(256, jnp.int32)
    lowered = jax.jit(ahead._first).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert "cp.async.bulk.prefetch.L2.global [a], 128" in lowered.as_text()


@pytest.mark.parametrize("family", ["llama", "nemotron_h"])
def test_every_launch_of_a_model_has_its_share(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pulls what later launches read, never its own weights or earlier ones, and all of so small a model is."""
    model = model_of(family, 0.0, tiles=True)
    params, places = model.params, [(i, kind) for i, kinds in enumerate(model.config.pattern) for kind in kinds]
    head = params.get("head", params["embed"])
    monkeypatch.setattr(ahead, "available", lambda: False)  # as on any device but Hopper and newer
    assert all(each == ahead.NOTHING for plan in fused.coming(params, places, head).values() for each in plan)
    monkeypatch.setattr(ahead, "available", lambda: True)
    found = fused.coming(params, places, head)
    assert list(found) == places
    number, when = 0, {}
    for i, kind in places:
        assert len(found[i, kind]) == len(fused.LAUNCHES[kind])
        for names in fused.LAUNCHES[kind]:
            leaves = params["layers"][i][kind]
            parts = [part for name in names if name in leaves for part in fused._stored(leaves[name])]
            when |= {id(part): number for part in parts}
            number += 1
    when |= {id(part): number for part in fused._stored(head)}
    pulled = [each for place in places for each in found[place]]
    for launch, each in enumerate(pulled):
        assert all(when[id(array)] > launch for array in each.arrays)
    named = {id(array) for each in pulled for array in each.arrays}
    assert named == {key for key, launch in when.items() if launch > 0}


@pytest.mark.gpu
def test_a_kernel_that_pulls_is_right_on_a_gpu() -> None:
    assert ahead._probed()
