"""Nested codes: one 4-bit integer per weight whose leading 3 bits are a model of their own.

A code c from -8 to 7 stands for c * fine at 4 bits and, with h = floor(c / 2) from -4 to 3, for (h + 1/4) * coarse at
3 bits: with coarse = 2 * fine that is midway between the two codes that share h. Both models' rounding errors are
carried over to later columns, each through its own Hessian and on its own copy of the weight; at each entry that code
is taken which adds least to a weighted sum of both output errors.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from benchmarks.rounding_math import Method, _candidates, factor_of, nearest, refit_scales
from uniql_jax.compression.compiling import jit

Pair = tuple[Array, Array]
OFFSET = 0.25


def leading(codes: Array) -> Array:
    """What the leading 3 bits say, in units of the coarse scale: h + 1/4."""
    return jnp.floor(codes / 2) + OFFSET


def _choose(a: Array, b: Array, fine: Array, coarse: Array, weights: Pair) -> Array:
    """The code of least weighted error among those near what either copy of the weight would take."""
    here = nearest(a, fine, 4)
    there = jnp.clip(jnp.round(b / jnp.where(coarse == 0, 1.0, coarse) - OFFSET), -4, 3)
    # within the coarse cell that its copy prefers, the nearest of its two codes; and those around the fine one's
    tries = [here, jnp.clip(here - 1, -8, 7), jnp.clip(here + 1, -8, 7), jnp.clip(here, 2 * there, 2 * there + 1)]
    tries = jnp.stack(tries)
    cost = weights[0] * jnp.square(a - tries * fine) + weights[1] * jnp.square(b - leading(tries) * coarse)
    return jnp.take_along_axis(tries, cost.argmin(0)[None], axis=0)[0]


def _block(blocks: Pair, scales: Pair, squares: Pair, weights: Pair) -> tuple[Array, Pair]:
    """Codes of one group and both copies' errors over their factors' diagonals."""
    index = jnp.arange(len(squares[0]))[:, None]

    def one(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        a, b, codes = state
        rows = [square[j] for square in squares]
        # an error's cost is its square over the factor's squared diagonal: what remains after compensation
        both = weights[0] / rows[0][j] ** 2, weights[1] / rows[1][j] ** 2
        code = _choose(a[j], b[j], scales[0], scales[1], both)
        errors = (a[j] - code * scales[0]) / rows[0][j], (b[j] - leading(code) * scales[1]) / rows[1][j]
        copies = []
        for copy, row, error in zip((a, b), rows, errors, strict=True):
            copies.append(jnp.where(index > j, copy - row[:, None] * error, jnp.where(index == j, error, copy)))
        return copies[0], copies[1], codes.at[j].set(code)

    a, b, codes = jax.lax.fori_loop(0, len(index), one, (*blocks, jnp.zeros_like(blocks[0])))
    return codes, (a, b)


@functools.partial(jit, static_argnames=("method", "group"))
def round_nested(
    columns: Float[Array, "width rows"],
    hessians: tuple[Float[Array, "width width"], Float[Array, "width width"]],
    *,
    method: Method,
    group: int,
) -> tuple[Int[Array, "width rows"], Float[Array, "groups rows"], Float[Array, "groups rows"]]:
    """Codes, and the scales of 4 and of 3 bits.

    Args:
        columns: the weight.
        hessians: of the inputs in the 4-bit and in the 3-bit model.
        method: `share`: weight of the 3-bit error; 0 is GPTQ at 4 bits, 1 at 3 bits. `coarse`: "own" scales for 3 bits,
            or "tied" to twice those of 4 bits. `sweeps`: joint coordinate descents, scales refitted before each.
        group: entries of a column that share a scale.
    """
    width, share = len(columns), method.share or 0.0
    hessians = tuple(h / jnp.maximum(jnp.diagonal(h).mean(), 1e-30) for h in hessians)
    factors = [factor_of(h, method) for h in hessians]
    # a step of 3 bits is twice as wide: its squared error weighs a quarter
    weights = jnp.float32(4 * (1 - share)), jnp.float32(share)
    importance = [jnp.diagonal(h) + 1e-6 for h in hessians]

    def one(g: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        a, b, codes, fines, coarses = state
        start = g * group
        blocks = [jax.lax.dynamic_slice_in_dim(copy, start, group) for copy in (a, b)]
        stripes = [jax.lax.dynamic_slice_in_dim(factor, start, group) for factor in factors]
        squares = [jax.lax.dynamic_slice_in_dim(stripe, start, group, axis=1) for stripe in stripes]
        near = [jax.lax.dynamic_slice_in_dim(value, start, group)[:, None] for value in importance]
        tries = _candidates(blocks[0], 4, 21)
        cost = _nested_cost(blocks, tries, 2 * tries, near, weights)
        best = cost.argmin(0)[None]
        fine = jnp.take_along_axis(tries, best, axis=0)[0]
        code, errors = _block((blocks[0], blocks[1]), (fine, 2 * fine), (squares[0], squares[1]), weights)
        later = jnp.arange(width) >= start + group
        a, b = (
            copy - jnp.where(later, stripe, 0.0).T @ error
            for copy, stripe, error in zip((a, b), stripes, errors, strict=True)
        )
        return (
            a,
            b,
            jax.lax.dynamic_update_slice_in_dim(codes, code, start, axis=0),
            jax.lax.dynamic_update_slice_in_dim(fines, fine[None], g, axis=0),
            jax.lax.dynamic_update_slice_in_dim(coarses, 2 * fine[None], g, axis=0),
        )

    empty = jnp.zeros((width // group, columns.shape[1]), columns.dtype)
    begin = columns, columns, jnp.zeros_like(columns), empty, empty
    _, _, codes, fine, coarse = jax.lax.fori_loop(0, width // group, one, begin)
    for sweep in range(method.sweeps + 1):
        if method.coarse == "own":
            coarse = refit_scales(columns, leading(codes), hessians[1], coarse, group)
            fine = refit_scales(columns, codes, hessians[0], fine, group) if method.sweeps else fine
        if sweep < method.sweeps:
            codes = _descend(columns, codes, fine, coarse, hessians, weights, group)
    return codes.astype(jnp.int8), fine, coarse


def _nested_cost(blocks: list[Array], fine: Array, coarse: Array, near: list[Array], weights: Pair) -> Array:
    """Weighted error of rounding to nearest at each try of both scales."""
    codes = nearest(blocks[0], fine[:, None], 4)
    errors = blocks[0] - codes * fine[:, None], blocks[1] - leading(codes) * coarse[:, None]
    return sum((weights[i] * jnp.square(errors[i]) * near[i]).sum(-2) for i in (0, 1))  # type: ignore[return-value]


def _descend(
    columns: Array, codes: Array, fine: Array, coarse: Array, hessians: Pair | tuple, weights: Pair, group: int
) -> Array:
    """One pass of coordinate descent over the codes on the weighted sum of both output errors."""
    scales = [jnp.repeat(scale, group, axis=0) for scale in (fine, coarse)]
    offsets = jnp.arange(-8.0, 8.0)[:, None]

    def one(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        codes, *slopes = state
        held = codes[j] * scales[0][j], leading(codes[j]) * scales[1][j]
        tries = offsets * scales[0][j], leading(offsets) * scales[1][j]
        cost = 0.0
        for i in (0, 1):
            change = tries[i] - held[i]  # the error falls by 2 slope change - H_jj change^2
            cost = cost + weights[i] * (hessians[i][j, j] * change**2 - 2 * slopes[i][j] * change)
        code = offsets[jnp.argmin(cost, axis=0), 0]
        now = code * scales[0][j], leading(code) * scales[1][j]
        slopes = [slopes[i] - hessians[i][:, j][:, None] * (now[i] - held[i]) for i in (0, 1)]
        return codes.at[j].set(code), slopes[0], slopes[1]

    codes = codes.astype(columns.dtype)
    slopes = [
        hessians[0] @ (columns - codes * scales[0]),
        hessians[1] @ (columns - leading(codes) * scales[1]),
    ]
    return jax.lax.fori_loop(0, len(columns), one, (codes, *slopes))[0]
