"""GPTQ of a group in one kernel: the same integers, scales and errors as column by column."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.pallas_cases import nvidia
from uniql_jax.compression.math import gptq
from uniql_jax.compression.math import group as groups
from uniql_jax.pallas_kernels import compat, selfcheck
from uniql_jax.pallas_kernels.round_group import MOST_GROUP, round_group

SIZES = pytest.mark.parametrize(("group", "rows"), [(128, 192), (144, 50), (64, 129), (16, 5), (24, 1), (8, 300)])


def inputs(rng: np.random.Generator, group: int, rows: int) -> tuple[jax.Array, ...]:
    """A group's columns, their importance, and its part of an inverse factor."""
    block = rng.normal(size=(group, rows)) * np.exp(rng.normal(size=rows))
    seen = rng.normal(size=(4 * group, group)) @ rng.normal(size=(group, group))
    gram = seen.T @ seen / len(seen) + 0.01 * np.eye(group)
    factor = np.linalg.cholesky(np.linalg.inv(gram)).T
    return tuple(jnp.asarray(value, jnp.float32) for value in (block, np.diag(gram), factor))


def both(given: tuple[jax.Array, ...], bits: int, **how: bool) -> tuple[groups.Group, groups.Group]:
    settings = {"bits": bits, "search": True, "return_unrounded": True} | how
    kernel = jax.jit(functools.partial(groups.by_kernel, **settings))
    return groups.by_columns(*given, **settings), kernel(*given)


@SIZES
@pytest.mark.parametrize("bits", [4, 8])
def test_a_group_is_rounded_as_column_by_column(rng: np.random.Generator, group: int, rows: int, bits: int) -> None:
    want, got = both(inputs(rng, group, rows), bits)
    assert got.codes.dtype == jnp.int8
    np.testing.assert_array_equal(got.codes, want.codes)
    np.testing.assert_array_equal(got.scale, want.scale)
    np.testing.assert_allclose(got.errors, want.errors, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.before, want.before, rtol=1e-5, atol=1e-6)


def test_rows_of_zeros_and_of_one_sign(rng: np.random.Generator) -> None:
    block, *others = inputs(rng, 24, 40)
    block = block.at[:, 0].set(0).at[:, 1].set(jnp.abs(block[:, 1])).at[:, 2].set(-jnp.abs(block[:, 2]))
    block = block.at[:, 3].set(block[:, 3] * 1e-38)
    want, got = both((block, *others), 4)
    np.testing.assert_array_equal(got.codes, want.codes)
    np.testing.assert_array_equal(got.scale, want.scale)
    assert got.scale[0] == 0


@pytest.mark.parametrize("how", [{"search": False}, {"return_unrounded": False}])
def test_without_a_search_or_what_was_rounded(rng: np.random.Generator, how: dict[str, bool]) -> None:
    want, got = both(inputs(rng, 72, 33), 4, **how)
    assert (got.before is None) is (how == {"return_unrounded": False})
    np.testing.assert_array_equal(got.codes, want.codes)
    np.testing.assert_array_equal(got.scale, want.scale)


def test_a_whole_matrix_through_the_kernel(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, seen = rng.normal(size=(70, 200)), rng.normal(size=(900, 200))
    given = jnp.asarray(weight, jnp.float32), jnp.asarray(seen.T @ seen / 900, jnp.float32)
    how = {"bits": 4, "group": 64, "return_unrounded": True}
    want = gptq.quantize.__wrapped__(*given, **how)
    monkeypatch.setattr(gptq, "kernel_serves", lambda bits: bits == 4)
    for one, other in zip(gptq.quantize.__wrapped__(*given, **how), want, strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=1e-4, atol=1e-5)


def test_the_check_before_a_device_is_trusted_finds_nothing_here() -> None:
    """What it compares with is a CPU's: elsewhere errors before rounding differ in their last digits."""
    assert groups.kernel_error(4) <= (0 if jax.default_backend() == "cpu" else 1e-6)


def test_a_group_that_is_too_wide_is_refused() -> None:
    width = MOST_GROUP + 1
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((width, 8), (width,), (width, width), (21,))]
    with pytest.raises(NotImplementedError, match="wider than 1024"):
        jax.eval_shape(functools.partial(round_group.__wrapped__, limits=(-8, 7), smallest=1e-38), *shapes)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@SIZES
def test_kernel_lowers_for_nvidia_gpus(monkeypatch: pytest.MonkeyPatch, group: int, rows: int) -> None:
    pytest.importorskip("jax.experimental.pallas.triton")
    monkeypatch.setattr(compat, "interpreted", lambda: False)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((group, rows), (group,), (group, group), (21,))]
    call = functools.partial(round_group.__wrapped__, limits=(-8, 7), smallest=1e-38, return_unrounded=True)
    with nvidia():
        lowered = jax.jit(call).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert "triton" in lowered.as_text()


@pytest.mark.gpu
@SIZES
def test_on_the_device(rng: np.random.Generator, group: int, rows: int) -> None:
    """Next to the loop over columns on the CPU, and next to it on the device, which adds up in another order."""
    for bits in (4, 8):
        given = inputs(rng, group, rows)
        on_device, got = both(given, bits)
        loop = functools.partial(groups.by_columns, bits=bits, search=True, return_unrounded=True)
        for want in (selfcheck.expected(loop, *given), on_device):
            assert np.mean(np.asarray(got.codes) != np.asarray(want.codes)) < 1e-3
            np.testing.assert_allclose(got.scale, want.scale, rtol=1e-2)
