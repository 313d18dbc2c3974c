"""One group of columns rounded by GPTQ: its scales, its integers, and the errors that later groups take over.

By a kernel where the device has one that computes as the loop over columns does, which is the specification.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from uniql_jax.compression.math.refine import nearest
from uniql_jax.pallas_kernels import selfcheck
from uniql_jax.pallas_kernels.round_group import round_group
from uniql_jax.weights.quantized import as_stored, limits

SCALE_GRID = tuple(1.0 - 0.025 * i for i in range(21))
"""Shrink factors tried for a group's scale, from max-abs down to half of it."""
SMALLEST = float(jnp.finfo(jnp.bfloat16).tiny)
"""The smallest normal bfloat16, and float32: what is below may be flushed to zero, and has no finite inverse."""


def largest(values: Float[Array, "..."]) -> Float[Array, ""]:
    """The largest magnitude, to divide by: 1 where all is zero."""
    most = jnp.max(jnp.abs(values))
    return jnp.where(most == 0, 1.0, most)


def search_scale(
    weight: Float[Array, "group rows"], importance: Float[Array, " group"], bits: int, search: bool
) -> Float[Array, " rows"]:
    """Scale per row: the shrunk max-abs scale with the least importance-weighted squared error, bfloat16-exact.

    The sign is chosen so that the entry of largest magnitude meets the end of the grid that has one step more.

    Args:
        weight: what is to be rounded, float32; errors are measured in the row's largest entry, so that none overflows.
        importance: weight of each entry's squared error, of any common size.
        bits: 4 or 8.
        search: False takes the max-abs scale.

    Returns:
        Scales, float32. 0 for a row of zeros and where the scale would be too small for a normal bfloat16.
    """
    low = limits(bits)[0]
    top, bottom = jnp.max(weight, axis=0), jnp.min(weight, axis=0)
    most = jnp.where(top > -bottom, top, bottom)
    most = jnp.where(jnp.abs(most / low) < 2 * SMALLEST, 0.0, most)
    base, unit = most / low, jnp.where(most == 0, 1.0, most)
    importance = importance / largest(importance)

    def attempt(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        scale = as_stored(base * jnp.asarray(SCALE_GRID, weight.dtype)[i])
        error = (weight - nearest(weight, scale, bits) * scale) / unit
        cost = jnp.sum(error * error * importance[:, None], axis=0)
        better = cost < best[0]
        return jnp.where(better, cost, best[0]), jnp.where(better, scale, best[1])

    steps = len(SCALE_GRID) if search else 1
    start = (jnp.full(base.shape, jnp.inf, weight.dtype), jnp.zeros_like(base))
    return jax.lax.fori_loop(0, steps, attempt, start)[1]


class Group(NamedTuple):
    """A group that was rounded: integers, scales, errors over the factor's diagonal, and what was rounded if wanted."""

    codes: Float[Array, "group rows"] | Int[Array, "group rows"]
    scale: Float[Array, " rows"]
    errors: Float[Array, "group rows"]
    before: Float[Array, "group rows"] | None


def by_columns(
    block: Float[Array, "group rows"],
    importance: Float[Array, " group"],
    square: Float[Array, "group group"],
    bits: int,
    search: bool,
    return_unrounded: bool,
) -> Group:
    """Round a group of columns one by one."""
    group = len(block)
    scale = search_scale(block, importance, bits, search)

    def one_column(j: Array, inner: tuple[Any, ...]) -> tuple[Any, ...]:
        block, quantized, before = inner
        column = jax.lax.dynamic_slice_in_dim(block, j, 1)
        integer = nearest(column, scale, bits)
        row = jax.lax.dynamic_slice_in_dim(square, j, 1)[0]
        error = (column - integer * scale) / row[j]
        # Rows before j are done; row j itself keeps its error, which the later groups need.
        index = jnp.arange(group)[:, None]
        block = jnp.where(index > j, block - row[:, None] * error, jnp.where(index == j, error, block))
        before = jax.lax.dynamic_update_slice_in_dim(before, column, j, 0) if return_unrounded else None
        return block, jax.lax.dynamic_update_slice_in_dim(quantized, integer, j, 0), before

    start = (block, jnp.zeros_like(block), jnp.zeros_like(block) if return_unrounded else None)
    errors, quantized, before = jax.lax.fori_loop(0, group, one_column, start)
    return Group(quantized, scale, errors, before)


def by_kernel(
    block: Float[Array, "group rows"],
    importance: Float[Array, " group"],
    square: Float[Array, "group group"],
    bits: int,
    search: bool,
    return_unrounded: bool,
) -> Group:
    """The same in one kernel."""
    grid = jnp.asarray(SCALE_GRID[: len(SCALE_GRID) if search else 1], jnp.float32)
    weights = importance / largest(importance)
    return Group(
        *round_group(
            block, weights, square, grid, limits=limits(bits), smallest=SMALLEST, return_unrounded=return_unrounded
        )
    )


def kernel_serves(bits: int) -> bool:
    """Whether the device computes with the kernel as without it; tried once a process, on a GPU alone."""
    if jax.default_backend() != "gpu":
        return False
    try:
        selfcheck.require(f"GPTQ of a group ({bits} bits)", functools.partial(kernel_error, bits))
    except NotImplementedError:
        return False
    return True


def kernel_error(bits: int) -> float:
    """For `selfcheck`: groups whose sizes fill no tile, and one of a usual size."""
    rng, found = np.random.default_rng(0), []
    for group, rows in ((128, 192), (72, 33), (16, 5)):
        block = jnp.asarray(rng.normal(size=(group, rows)), jnp.float32)
        inputs = rng.normal(size=(4 * group, group)).astype(np.float32)
        factor = np.linalg.cholesky(np.linalg.inv(inputs.T @ inputs / len(inputs))).T
        given = (jnp.asarray(np.square(inputs).mean(0)), jnp.asarray(factor, jnp.float32))
        how = {"bits": bits, "search": True, "return_unrounded": True}
        want = selfcheck.expected(functools.partial(by_columns, **how), block, *given)
        found.append(selfcheck.relative(jax.jit(functools.partial(by_kernel, **how))(block, *given), want))
    return max(found)
