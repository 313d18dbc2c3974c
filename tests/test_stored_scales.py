"""Integers are made with the very scales that are stored, also where XLA drops conversions (on GPUs)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uniql_jax.compression.math.group import by_columns, search_scale
from uniql_jax.compression.math.nested import candidates
from uniql_jax.compression.math.reconstruct import _scale
from uniql_jax.compression.math.refine import refit_scales
from uniql_jax.pallas_kernels.attention.caches import dequantize, quantize
from uniql_jax.weights.quantized import as_stored


def spread(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape) * np.exp(rng.normal(size=shape)), jnp.float32)


def test_stored_scales_are_those_of_a_conversion_there_and_back(rng: np.random.Generator) -> None:
    values = jnp.concatenate([spread(rng, 4096), jnp.asarray([0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 3e38])])
    np.testing.assert_array_equal(as_stored(values), values.astype(jnp.bfloat16).astype(jnp.float32))


SCALES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "search": lambda block: search_scale(block, jnp.ones(len(block)), 4, True),
    "columns": lambda block: by_columns(block, jnp.ones(len(block)), jnp.eye(len(block)), 4, True, False).scale,
    "candidates": lambda block: candidates(block, 4),
    "moved": lambda block: _scale(block, 0.01 * block),
}


@pytest.mark.parametrize("name", SCALES)
def test_no_scale_goes_through_bfloat16(name: str, rng: np.random.Generator) -> None:
    """The result is exact in bfloat16, and no conversion is asked for that a compiler may drop."""
    block = spread(rng, 16, 12)
    found = np.asarray(jax.jit(SCALES[name])(block))
    np.testing.assert_array_equal(found, found.astype(jnp.bfloat16).astype(np.float32))
    text = jax.jit(SCALES[name]).lower(block).as_text()
    assert "reduce_precision" in text
    assert "bf16" not in text


def test_refitted_scales_are_exact(rng: np.random.Generator) -> None:
    columns, width = spread(rng, 32, 6), 16
    hessian = jnp.asarray(np.cov(rng.normal(size=(32, 200))), jnp.float32)
    scales = SCALES["search"](columns[:width])[None].repeat(2, 0)
    codes = jnp.clip(jnp.round(columns / jnp.repeat(scales, width, 0)), -8, 7)
    refit = jax.jit(refit_scales, static_argnums=4)
    found = np.asarray(refit(columns, codes, hessian, scales, width))
    np.testing.assert_array_equal(found, found.astype(jnp.bfloat16).astype(np.float32))
    assert "bf16" not in refit.lower(columns, codes, hessian, scales, width).as_text()


def test_integers_of_a_cache_are_of_its_scale(rng: np.random.Generator) -> None:
    x = spread(rng, 3, 5, 32)
    assert "reduce_precision" in jax.jit(quantize).lower(x).as_text()
    codes, scale = quantize(x)
    wide = np.asarray(scale, np.float32)[..., None]
    np.testing.assert_array_equal(codes, np.clip(np.floor(np.asarray(x) * (1 / wide) + 0.5), -127, 127))
    assert np.abs(np.asarray(dequantize(codes, scale, jnp.float32)) - x).max() <= 0.51 * wide.max()
