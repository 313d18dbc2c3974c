"""One suite over every implementation of the packed embedding: rows are equal, not close."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.pallas_cases import Case, nvidia, random_case
from uniql_jax.pallas_kernels import compat
from uniql_jax.pallas_kernels.embedding import api, embed

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", list(api.IMPLEMENTATIONS))


def options(case: Case) -> dict:
    return dict(bits=case.bits, group=case.group, width=case.width)


def rows(tokens: jnp.ndarray, case: Case, dtype: type, implementation: str) -> jnp.ndarray:
    """The kernel under jit."""
    call = jax.jit(lambda t, d, s: embed(t, d, s, dtype=dtype, implementation=implementation, **options(case)))
    return call(tokens, case.data, case.scale)


@IMPLEMENTATIONS
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("table", "shape", "dtype"),
    [
        ((50, 576, 144), (2, 5), jnp.bfloat16),
        ((7, 300, 128), (), jnp.float32),
        ((64, 72, 72), (1,), jnp.bfloat16),
        ((11, 448, 112), (3, 1, 2), jnp.float32),
    ],
)
def test_rows_are_exact(rng: np.random.Generator, implementation: str, bits: int, table, shape, dtype) -> None:
    case = random_case(rng, *table, bits=bits)
    tokens = jnp.asarray(rng.integers(0, table[0], shape), jnp.int32)
    got = rows(tokens, case, dtype, implementation)
    assert got.dtype == dtype
    # An integer times a bfloat16 fits float32, so float64 rounds to the same row.
    want = case.dense[np.asarray(tokens)].astype(np.float32).astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(np.asarray(got), want)


@IMPLEMENTATIONS
def test_tokens_beyond_the_table_are_clipped(rng: np.random.Generator, implementation: str) -> None:
    case = random_case(rng, 9, 72, 24)
    tokens = jnp.asarray([-1, -(2**31), 9, 2**31 - 1, 8], jnp.int32)
    got = rows(tokens, case, jnp.float32, implementation)
    np.testing.assert_array_equal(np.asarray(got), case.dense[[0, 0, 8, 8, 8]].astype(np.float32))


@IMPLEMENTATIONS
def test_a_table_wider_than_one_tile(rng: np.random.Generator, implementation: str) -> None:
    case = random_case(rng, 5, 4100, 128)
    tokens = jnp.asarray([4, 0], jnp.int32)
    got = rows(tokens, case, jnp.float32, implementation)
    np.testing.assert_array_equal(np.asarray(got), case.dense[[4, 0]].astype(np.float32))


def test_no_token_gives_no_row(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(rng, 5, 72, 24)
    none = jnp.zeros((0,), jnp.int32)
    monkeypatch.setenv("UNIQL_KERNELS", "pallas")
    got = embed(none, case.data, case.scale, dtype=jnp.float32, **options(case))
    assert got.shape == (0, 72)


def test_bad_input_is_refused(rng: np.random.Generator) -> None:
    case = random_case(rng, 5, 72, 24)
    with pytest.raises(ValueError, match="width 73"):
        embed(jnp.zeros(1, jnp.int32), case.data, case.scale, bits=4, group=24, width=73, dtype=jnp.float32)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("bits", [4, 8])
def test_kernel_lowers_for_nvidia_gpus(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    pytest.importorskip("jax.experimental.pallas.triton")
    monkeypatch.setattr(compat, "interpreted", lambda: False)
    case = random_case(rng, 50, 576, 144, bits=bits)
    call = jax.jit(
        lambda t: embed(t, case.data, case.scale, dtype=jnp.bfloat16, implementation="pallas", **options(case))
    )
    tokens = jnp.zeros((2, 3), jnp.int32)
    with nvidia():
        lowered = call.trace(tokens).lower(lowering_platforms=("cuda",))
    assert "triton" in lowered.as_text()
