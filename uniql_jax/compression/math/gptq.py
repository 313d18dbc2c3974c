"""GPTQ and rounding to 4 or 8 bits, symmetric, one searched scale per group; compiled once per shape.

A column's rounding error is carried over to the columns that come later in the sorted order, weighed by the inverse
Hessian, so slicing after quantizing does no extra harm (Frantar et al., arXiv 2210.17323; method: quantization).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from uniql_jax.compiling import jit
from uniql_jax.compression.math.refine import nearest, refine
from uniql_jax.pallas_kernels import selfcheck
from uniql_jax.pallas_kernels.round_group import round_group
from uniql_jax.weights.quantized import limits

SCALE_GRID = tuple(1.0 - 0.025 * i for i in range(21))
"""Shrink factors tried for a group's scale, from max-abs down to half of it."""
ROWS_AT_ONCE = {"cpu": 1024, "gpu": 32768}
"""Rows rounded together: what a core's cache holds of a group's columns, and a bound of a GPU's memory."""
LEAST_DAMPING, MOST_DAMPING = 1e-7, 1e6
SMALLEST = float(jnp.finfo(jnp.bfloat16).tiny)
"""The smallest normal bfloat16, and float32: what is below may be flushed to zero, and has no finite inverse."""


def inverse_factor(hessian: Float[Array, "k k"], damping: float | Float[Array, ""] = 0.01) -> Float[Array, "k k"]:
    """Upper triangular U with U^T U = (H + lambda I)^-1, lambda = damping * mean diagonal.

    JAX returns NaN where a factorization fails, so lambda grows tenfold until the factor is finite. One Cholesky of
    the reversed matrix and one triangular inverse give U without forming the inverse.

    Args:
        hessian: symmetric, float32; positive semidefinite up to rounding, of any rank and size.
        damping: not negative.

    Returns:
        The factor, float32; NaN where the Hessian is not finite.
    """
    size = hessian.shape[0]
    eye = jnp.eye(size, dtype=hessian.dtype)
    peak = _peak(jnp.diagonal(hessian))
    hessian = hessian / peak
    mean = jnp.mean(jnp.diagonal(hessian))
    base = jnp.where(mean > 0, mean, 1.0)
    finite = jnp.isfinite(hessian).all()

    def factor(amount: Array) -> Array:
        lower = jnp.linalg.cholesky((hessian + amount * base * eye)[::-1, ::-1])
        return jax.scipy.linalg.solve_triangular(lower, eye, lower=True)[::-1, ::-1]

    def bad(state: tuple[Array, Array]) -> Array:
        return ~jnp.isfinite(state[1]).all() & finite & (state[0] < MOST_DAMPING)

    def worse(state: tuple[Array, Array]) -> tuple[Array, Array]:
        amount = jnp.maximum(state[0], LEAST_DAMPING) * 10
        return amount, factor(amount)

    start = jnp.asarray(damping, hessian.dtype)
    return jax.lax.while_loop(bad, worse, (start, factor(start)))[1] / jnp.sqrt(peak)


def _peak(values: Float[Array, "..."]) -> Float[Array, ""]:
    """The largest magnitude, to divide by: 1 where all is zero."""
    peak = jnp.max(jnp.abs(values))
    return jnp.where(peak == 0, 1.0, peak)


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
    importance = importance / _peak(importance)

    def attempt(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        scale = (base * jnp.asarray(SCALE_GRID, weight.dtype)[i]).astype(jnp.bfloat16).astype(weight.dtype)
        error = (weight - nearest(weight, scale, bits) * scale) / unit
        cost = jnp.sum(error * error * importance[:, None], axis=0)
        better = cost < best[0]
        return jnp.where(better, cost, best[0]), jnp.where(better, scale, best[1])

    steps = len(SCALE_GRID) if search else 1
    start = (jnp.full(base.shape, jnp.inf, weight.dtype), jnp.zeros_like(base))
    return jax.lax.fori_loop(0, steps, attempt, start)[1]


@functools.partial(jit, static_argnames=("bits", "group", "search", "propagate", "descents", "return_unrounded"))
def quantize(
    weight: Float[Array, "rows width"],
    hessian: Float[Array, "width width"] | None = None,
    *,
    bits: int,
    group: int,
    search: bool = True,
    propagate: bool = True,
    damping: float | Float[Array, ""] = 0.01,
    descents: int = 0,
    return_unrounded: bool = False,
) -> tuple[Int[Array, "rows width"], Float[Array, "rows groups"], Float[Array, "rows width"] | None]:
    """Round a weight whose rows each contract `width` inputs.

    Args:
        weight: the rows.
        hessian: mean outer product of the inputs, float32; None means plain rounding.
        bits: 4 or 8.
        group: entries of a row that share a scale; a last group may be short.
        search: False takes max-abs scales (a baseline).
        propagate: False rounds without carrying errors over (a baseline).
        damping: see `inverse_factor`.
        descents: passes of coordinate descent afterwards, with refitted scales (refine.py); needs a Hessian.
        return_unrounded: return what was rounded as well.

    Returns:
        Integers (int8), bfloat16 scales and, with `return_unrounded`, what was rounded to them, float32: the weight
        with all errors that were carried to it. Integers cannot be NaN: where an input or a result is not finite, the
        scales are.
    """
    rows, width = weight.shape
    groups = -(-width // group)
    pad = groups * group - width
    if hessian is None:
        importance, factor, scaled = jnp.ones(groups * group, jnp.float32), None, None
    else:
        hessian = jnp.pad(hessian.astype(jnp.float32), ((0, pad), (0, pad)))
        scaled = hessian / _peak(jnp.diagonal(hessian))
        diagonal = jnp.diagonal(scaled)
        importance = diagonal + 1e-6 * jnp.mean(diagonal) + jnp.finfo(jnp.float32).tiny
        factor = inverse_factor(hessian, damping) if propagate else None

    def some_rows(weight: Array) -> tuple[Any, ...]:
        # One column of the weight is one contiguous row here: the loop walks over columns.
        columns = jnp.pad(weight.astype(jnp.float32), ((0, 0), (0, pad))).T
        codes, scales, rounded, left = _quantize_columns(
            columns, importance, factor, bits, group, search, return_unrounded
        )
        if descents and scaled is not None:
            how = {"bits": bits, "group": group, "descents": descents}
            refined, scales, rounded = refine(columns, codes.astype(jnp.float32), scales, scaled, **how)
            codes, rounded = refined.astype(jnp.int8), rounded if return_unrounded else None
        scales = jnp.where(jnp.isfinite(weight).all() & jnp.isfinite(left).all(), scales, jnp.nan)
        return codes[:width].T, scales.T.astype(jnp.bfloat16), None if rounded is None else rounded[:width].T

    most = ROWS_AT_ONCE["cpu" if jax.default_backend() == "cpu" else "gpu"]
    parts = -(-rows // most)
    if parts == 1:
        codes, scales, rounded = some_rows(weight)
    else:
        each = -(-rows // parts)
        stacked = jnp.pad(weight, ((0, parts * each - rows), (0, 0))).reshape(parts, each, width)
        done = jax.lax.map(some_rows, stacked)
        codes, scales, rounded = jax.tree.map(lambda value: value.reshape(parts * each, -1)[:rows], done)
    finite = True if hessian is None else jnp.isfinite(hessian).all()
    # Where one part is not finite, nothing is: the caller sees it in any scale.
    scales = jnp.where(finite & jnp.isfinite(scales).all(), scales, jnp.nan)
    return codes, scales, rounded


class _Group(NamedTuple):
    """A group that was rounded: integers, scales, errors over the factor's diagonal, and what was rounded if wanted."""

    codes: Float[Array, "group rows"] | Int[Array, "group rows"]
    scale: Float[Array, " rows"]
    errors: Float[Array, "group rows"]
    before: Float[Array, "group rows"] | None


def _by_columns(
    block: Float[Array, "group rows"],
    importance: Float[Array, " group"],
    square: Float[Array, "group group"],
    bits: int,
    search: bool,
    return_unrounded: bool,
) -> _Group:
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
    return _Group(quantized, scale, errors, before)


def _by_kernel(
    block: Float[Array, "group rows"],
    importance: Float[Array, " group"],
    square: Float[Array, "group group"],
    bits: int,
    search: bool,
    return_unrounded: bool,
) -> _Group:
    """The same in one kernel."""
    grid = jnp.asarray(SCALE_GRID[: len(SCALE_GRID) if search else 1], jnp.float32)
    weights = importance / _peak(importance)
    return _Group(
        *round_group(
            block, weights, square, grid, limits=limits(bits), smallest=SMALLEST, return_unrounded=return_unrounded
        )
    )


def _kernel_serves(bits: int) -> bool:
    """Whether the device computes with the kernel as without it; tried once a process, on a GPU alone."""
    if jax.default_backend() != "gpu":
        return False
    try:
        selfcheck.require(f"GPTQ of a group ({bits} bits)", functools.partial(_kernel_error, bits))
    except NotImplementedError:
        return False
    return True


def _kernel_error(bits: int) -> float:
    """For `selfcheck`: groups whose sizes fill no tile, and one of a usual size."""
    rng, found = np.random.default_rng(0), []
    for group, rows in ((128, 192), (72, 33), (16, 5)):
        block = jnp.asarray(rng.normal(size=(group, rows)), jnp.float32)
        inputs = rng.normal(size=(4 * group, group)).astype(np.float32)
        factor = np.linalg.cholesky(np.linalg.inv(inputs.T @ inputs / len(inputs))).T
        given = (jnp.asarray(np.square(inputs).mean(0)), jnp.asarray(factor, jnp.float32))
        how = {"bits": bits, "search": True, "return_unrounded": True}
        want = selfcheck.expected(functools.partial(_by_columns, **how), block, *given)
        found.append(selfcheck.relative(jax.jit(functools.partial(_by_kernel, **how))(block, *given), want))
    return max(found)


def _quantize_columns(
    columns: Float[Array, "padded rows"],
    importance: Float[Array, " padded"],
    factor: Float[Array, "padded padded"] | None,
    bits: int,
    group: int,
    search: bool,
    return_unrounded: bool,
) -> tuple[Array, Array, Array | None, Array]:
    """Codes, scales [groups, rows], what was rounded, and what is left of the columns; a factor carries errors over."""
    padded, rows = columns.shape
    groups = padded // group
    later = jnp.arange(padded)
    one = _by_kernel if _kernel_serves(bits) else _by_columns

    def one_group(g: Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
        columns, codes, scales, rounded = state
        start = g * group
        block = jax.lax.dynamic_slice(columns, (start, 0), (group, rows))
        weighed = jax.lax.dynamic_slice(importance, (start,), (group,))
        if factor is None:
            scale = search_scale(block, weighed, bits, search)
            quantized, before = nearest(block, scale, bits), block
        else:
            stripe = jax.lax.dynamic_slice(factor, (start, 0), (group, padded))
            square = jax.lax.dynamic_slice(stripe, (0, start), (group, group))
            quantized, scale, errors, before = one(block, weighed, square, bits, search, return_unrounded)
            columns = columns - jnp.where(later >= start + group, stripe, 0.0).T @ errors
        return (
            columns,
            jax.lax.dynamic_update_slice(codes, quantized.astype(jnp.int8), (start, 0)),
            jax.lax.dynamic_update_slice(scales, scale[None], (g, 0)),
            jax.lax.dynamic_update_slice(rounded, before, (start, 0)) if return_unrounded else None,
        )

    codes = jnp.zeros((padded, rows), jnp.int8)
    scales = jnp.zeros((groups, rows), jnp.float32)
    begin = (columns, codes, scales, jnp.zeros_like(columns) if return_unrounded else None)
    left, codes, scales, rounded = jax.lax.fori_loop(0, groups, one_group, begin)
    return codes, scales, rounded, left
