"""GPTQ and rounding to 4 or 8 bits, symmetric, one searched scale per group; compiled once per shape.

A column's rounding error is carried over to the columns that come later in the sorted order, weighed by the inverse
Hessian, so slicing after quantizing does no extra harm (Frantar et al., arXiv 2210.17323; method: quantization).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.compiling import jit
from uniql_jax.compression.math.group import by_columns, by_kernel, kernel_serves, largest, search_scale
from uniql_jax.compression.math.refine import nearest, refine
from uniql_jax.compression.math.triangular import inverse_cholesky

ROWS_AT_ONCE = {"cpu": 1024, "gpu": 32768}
"""Rows rounded together: what a core's cache holds of a group's columns, and a bound of a GPU's memory."""
LEAST_DAMPING, MOST_DAMPING = 1e-7, 1e6


def inverse_factor(hessian: Float[Array, "k k"], damping: float | Float[Array, ""] = 0.01) -> Float[Array, "k k"]:
    """Upper triangular U with U^T U = (H + lambda I)^-1, lambda = damping * mean diagonal.

    JAX returns NaN where a factorization fails, so lambda grows tenfold until the factor is finite. The reversed
    matrix's Cholesky factor gives U by its inverse, without forming that of H.

    Args:
        hessian: symmetric, float32; positive semidefinite up to rounding, of any rank and size.
        damping: not negative.

    Returns:
        The factor, float32; NaN where the Hessian is not finite.
    """
    size = hessian.shape[0]
    eye = jnp.eye(size, dtype=hessian.dtype)
    peak = largest(jnp.diagonal(hessian))
    hessian = hessian / peak
    mean = jnp.mean(jnp.diagonal(hessian))
    base = jnp.where(mean > 0, mean, 1.0)
    finite = jnp.isfinite(hessian).all()

    def failed(state: tuple[Array, Array]) -> Array:
        untried = state[0] < 5 * MOST_DAMPING  # MOST_DAMPING itself as well, whatever rounding has made of it
        return ~jnp.isfinite(state[1]).all() & finite & untried

    def attempt(state: tuple[Array, Array]) -> tuple[Array, Array]:
        amount = state[0]
        factor = inverse_cholesky((hessian + amount * base * eye)[::-1, ::-1])[::-1, ::-1]
        return jnp.maximum(amount, LEAST_DAMPING) * 10, factor

    # The first try is a turn of the loop as well: the factorization stands in the program once.
    begin = jnp.asarray(damping, hessian.dtype), jnp.full_like(hessian, jnp.nan)
    return jax.lax.while_loop(failed, attempt, begin)[1] / jnp.sqrt(peak)


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
        scaled = hessian / largest(jnp.diagonal(hessian))
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
    one = by_kernel if kernel_serves(bits) else by_columns

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
            None
            if before is None or not return_unrounded
            else jax.lax.dynamic_update_slice(rounded, before, (start, 0)),
        )

    codes = jnp.zeros((padded, rows), jnp.int8)
    scales = jnp.zeros((groups, rows), jnp.float32)
    begin = (columns, codes, scales, jnp.zeros_like(columns) if return_unrounded else None)
    left, codes, scales, rounded = jax.lax.fori_loop(0, groups, one_group, begin)
    return codes, scales, rounded, left
