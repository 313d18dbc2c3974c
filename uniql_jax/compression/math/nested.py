"""Nested codes: one 4-bit integer a weight whose leading 3 bits are a model of their own.

A code c from -8 to 7 stands for c * fine at 4 bits and, with h = floor(c / 2) from -4 to 3, for (h + 1/4) * coarse at
3 bits: with coarse = 2 * fine that is midway between the two codes that share h. Both models' rounding errors are
carried over to later columns, each through its own Hessian and on its own copy of the weight (GPTQ, twice); at each
entry that code is taken which adds least to a weighted sum of both output errors. Coordinate descent on that sum
follows, with both models' scales refitted by least squares.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.compiling import jit
from uniql_jax.compression.math.gptq import inverse_factor
from uniql_jax.compression.math.group import SCALE_GRID, SMALLEST
from uniql_jax.compression.math.refine import damped, nearest, refit_scales
from uniql_jax.weights.planes import OFFSET
from uniql_jax.weights.quantized import as_stored, limits

Pair = tuple[Array, Array]
"""Of the 4-bit and of the 3-bit model."""
ROWS_AT_ONCE = {"cpu": 1024, "gpu": 8192}
"""Rows rounded together; tries of scales and codes take many times their memory."""


def candidates(block: Float[Array, "group rows"], bits: int) -> Float[Array, "tries rows"]:
    """Scales to try for a group, bfloat16-exact, the max-abs one first.

    The longer end of the grid meets the entry of largest magnitude.
    """
    top, bottom = block.max(0), block.min(0)
    base = jnp.where(top > -bottom, top, bottom) / limits(bits)[0]
    tries = base * jnp.asarray(SCALE_GRID, block.dtype)[:, None]
    return as_stored(tries)


def leading(codes: Float[Array, "..."]) -> Float[Array, "..."]:
    """What the leading 3 bits of 4-bit codes stand for, in steps of the coarse scale."""
    return jnp.floor(codes / 2) + OFFSET


@functools.partial(jit, static_argnames=("group", "sweeps"))
def quantize_nested(
    columns: Float[Array, "width rows"],
    hessians: tuple[Float[Array, "width width"], Float[Array, "width width"]],
    *,
    group: int,
    share: float | Float[Array, ""] = 0.5,
    sweeps: int = 2,
    damping: float | Float[Array, ""] = 0.01,
) -> tuple[Int[Array, "width rows"], Float[Array, "groups rows"], Float[Array, "groups rows"]]:
    """Round a weight to nested codes.

    Args:
        columns: the weight, a column of it an output; the width is a multiple of the group.
        hessians: mean outer products of the inputs in the 4-bit and in the 3-bit model.
        group: entries of an output that share a scale.
        share: weight of the 3-bit model's error, from 0 (GPTQ at 4 bits) to 1 (GPTQ at 3 bits). In its own steps: one
            of 3 bits is twice as wide, so its squared error is divided by 4.
        sweeps: coordinate descents.
        damping: see `gptq.inverse_factor`.

    Returns:
        Codes from -8 to 7 (int8), the scales of 4 bits and those of 3 bits, bfloat16-exact.
    """
    return _rounded(columns, *_prepared(hessians, damping), _weights(share), group, sweeps)


def _weights(share: float | Array) -> Pair:
    """Of the squared errors of 4 and of 3 bits, in steps of their own."""
    return jnp.asarray(4 * (1 - share), jnp.float32), jnp.asarray(share, jnp.float32)


def _prepared(hessians: Pair, damping: float | Array) -> tuple[Pair, Pair]:
    """Hessians of mean diagonal 1, and GPTQ's factors of them."""
    first, second = (h / jnp.maximum(jnp.diagonal(h).mean(), jnp.finfo(jnp.float32).tiny) for h in hessians)
    return (first, second), (inverse_factor(first, damping), inverse_factor(second, damping))


def _rounded(
    columns: Array, hessians: Pair, factors: Pair, weights: Pair, group: int, sweeps: int
) -> tuple[Array, Array, Array]:
    codes, fine = _gptq(columns, hessians, factors, weights, group)
    coarse, hessians = 2 * fine, (damped(hessians[0]), damped(hessians[1]))

    def refitted(codes: Array, fine: Array, coarse: Array) -> Pair:
        fine = refit_scales(columns, codes, hessians[0], fine, group) if sweeps else fine
        return fine, refit_scales(columns, leading(codes), hessians[1], coarse, group)

    def sweep(_: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        scales = refitted(*state)
        return _descend(columns, state[0], scales, hessians, weights, group), *scales

    codes, *scales = jax.lax.fori_loop(0, sweeps, sweep, (codes, fine, coarse))
    fine, coarse = refitted(codes, *scales)
    return codes.astype(jnp.int8), fine, coarse


def _gptq(columns: Array, hessians: Pair, factors: Pair, weights: Pair, group: int) -> tuple[Array, Array]:
    """Codes and fine scales by two GPTQs that share their codes."""
    width = len(columns)
    importance = [jnp.diagonal(h) + 1e-6 for h in hessians]

    def one(g: Array, state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        a, b, codes, scales = state
        start = g * group
        blocks = [jax.lax.dynamic_slice_in_dim(copy, start, group) for copy in (a, b)]
        stripes = [jax.lax.dynamic_slice_in_dim(factor, start, group) for factor in factors]
        squares = [jax.lax.dynamic_slice_in_dim(stripe, start, group, axis=1) for stripe in stripes]
        near = [jax.lax.dynamic_slice_in_dim(value, start, group)[:, None] for value in importance]
        tries = candidates(blocks[0], 4)
        nearby = nearest(blocks[0], tries[:, None], 4)
        errors = blocks[0] - nearby * tries[:, None], blocks[1] - leading(nearby) * 2 * tries[:, None]
        cost = sum((weights[i] * jnp.square(errors[i]) * near[i]).sum(-2) for i in (0, 1))
        scale = jnp.take_along_axis(tries, jnp.argmin(jnp.asarray(cost), axis=0)[None], axis=0)[0]
        code, found = _gptq_block((blocks[0], blocks[1]), scale, (squares[0], squares[1]), weights)
        later = jnp.arange(width) >= start + group
        a, b = (
            copy - jnp.where(later, stripe, 0.0).T @ error
            for copy, stripe, error in zip((a, b), stripes, found, strict=True)
        )
        codes = jax.lax.dynamic_update_slice_in_dim(codes, code, start, axis=0)
        return a, b, codes, jax.lax.dynamic_update_slice_in_dim(scales, scale[None], g, axis=0)

    empty = jnp.zeros((width // group, columns.shape[1]), columns.dtype)
    _, _, codes, scales = jax.lax.fori_loop(0, width // group, one, (columns, columns, jnp.zeros_like(columns), empty))
    return codes, scales


def _gptq_block(blocks: Pair, scale: Array, squares: Pair, weights: Pair) -> tuple[Array, Pair]:
    """Codes of one group, and both copies' errors over their factors' diagonals."""
    index = jnp.arange(len(squares[0]))[:, None]

    def one(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        a, b, codes = state
        rows = squares[0][j], squares[1][j]
        # What an error costs after compensation is its square over the factor's squared diagonal.
        code = _choose(a[j], b[j], scale, (weights[0] / rows[0][j] ** 2, weights[1] / rows[1][j] ** 2))
        errors = (a[j] - code * scale) / rows[0][j], (b[j] - leading(code) * 2 * scale) / rows[1][j]
        a, b = (
            jnp.where(index > j, copy - row[:, None] * error, jnp.where(index == j, error, copy))
            for copy, row, error in zip((a, b), rows, errors, strict=True)
        )
        return a, b, codes.at[j].set(code)

    a, b, codes = jax.lax.fori_loop(0, len(index), one, (*blocks, jnp.zeros_like(blocks[0])))
    return codes, (a, b)


def _choose(a: Array, b: Array, scale: Array, weights: Pair) -> Array:
    """The code of least weighted error among those near what either copy of the weight would take."""
    here = nearest(a, scale, 4)
    there = 2 * nearest(b - OFFSET * 2 * scale, 2 * scale, 3)
    tries = [here, jnp.clip(here - 1, -8, 7), jnp.clip(here + 1, -8, 7), jnp.clip(here, there, there + 1)]
    tries = jnp.stack(tries)
    cost = weights[0] * jnp.square(a - tries * scale) + weights[1] * jnp.square(b - leading(tries) * 2 * scale)
    return jnp.take_along_axis(tries, cost.argmin(0)[None], axis=0)[0]


def _descend(columns: Array, codes: Array, scales: Pair, hessians: Pair, weights: Pair, group: int) -> Array:
    """One pass of coordinate descent over the codes on the weighted sum of both output errors.

    The slopes of later groups change once a group: one product in place of `group` rank-one updates.
    """
    each = [jnp.repeat(scale, group, axis=0) for scale in scales]
    steps = jnp.arange(-8.0, 8.0)[:, None]
    taken = leading(steps)

    def one_group(g: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        codes, *slopes = state
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=g * group, slice_size=group)
        squares = [cut(cut(hessian), axis=1) for hessian in hessians]
        step = [cut(scale) for scale in each]
        before = cut(codes)

        def one(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            codes, *slopes = state
            held = codes[j], leading(codes[j])
            # A change lowers an output error by 2 slope change - H_jj change^2.
            changes = [(tries - held[i]) * step[i][j] for i, tries in enumerate((steps, taken))]
            cost = [weights[i] * changes[i] * (squares[i][j, j] * changes[i] - 2 * slopes[i][j]) for i in (0, 1)]
            code = steps[jnp.argmin(cost[0] + cost[1], axis=0), 0]
            moved = [(code - held[0]) * step[0][j], (leading(code) - held[1]) * step[1][j]]
            first, second = (slopes[i] - squares[i][:, j][:, None] * moved[i] for i in (0, 1))
            return codes.at[j].set(code), first, second

        after = jax.lax.fori_loop(0, group, one, (before, *map(cut, slopes)))[0]
        moved = (after - before) * step[0], (leading(after) - leading(before)) * step[1]
        first, second = (slopes[i] - cut(hessians[i], axis=1) @ moved[i] for i in (0, 1))
        return jax.lax.dynamic_update_slice_in_dim(codes, after, g * group, axis=0), first, second

    begin = hessians[0] @ (columns - codes * each[0]), hessians[1] @ (columns - leading(codes) * each[1])
    return jax.lax.fori_loop(0, len(columns) // group, one_group, (codes, *begin))[0]


@functools.partial(jit, static_argnames=("group", "sweeps"))
def round_rows(
    weight: Float[Array, "rows width"],
    hessians: tuple[Float[Array, "width width"], Float[Array, "width width"]],
    *,
    group: int,
    share: float | Float[Array, ""],
    sweeps: int,
    damping: float | Float[Array, ""],
) -> tuple[Int[Array, "rows width"], Float[Array, "rows groups"], Float[Array, "rows groups"]]:
    """`quantize_nested` for rows of any size and width, some at a time.

    Args:
        weight: a row of it contracts `width` inputs.
        hessians: see `quantize_nested`.
        group: entries of a row that share a scale; a last group may be short.
        share: see `quantize_nested`.
        sweeps: coordinate descents.
        damping: see `gptq.inverse_factor`.

    Returns:
        Codes (int8) and bfloat16 scales of 4 and of 3 bits; where an input is not finite, the scales are NaN.
    """
    rows, width = weight.shape
    spare = -width % group
    first, second = (jnp.pad(hessian, ((0, spare), (0, spare))) for hessian in hessians)
    prepared, weights = _prepared((first, second), damping), _weights(share)

    def some(part: Array) -> tuple[Array, Array, Array]:
        # In units of a power of two near a row's largest entry: squares of any finite weight stay finite, and scales
        # stay exact.
        peak = jnp.max(jnp.abs(part), axis=1, keepdims=True)
        usual = jnp.isfinite(peak) & (peak > 16 * SMALLEST)
        unit = jnp.exp2(jnp.floor(jnp.log2(jnp.where(usual, peak, 1.0))))
        columns = jnp.pad(jnp.where(usual, part / unit, 0.0).T, ((0, spare), (0, 0)))
        codes, *scales = _rounded(columns, *prepared, weights, group, sweeps)
        fine, coarse = ((scale.T * unit).astype(jnp.bfloat16) for scale in scales)
        finite = jnp.isfinite(part).all()
        return codes[:width].T, jnp.where(finite, fine, jnp.nan), jnp.where(finite, coarse, jnp.nan)

    most = ROWS_AT_ONCE["cpu" if jax.default_backend() == "cpu" else "gpu"]
    parts = -(-rows // most)
    if parts == 1:
        found = some(weight)
    else:
        each = -(-rows // parts)
        stacked = jnp.pad(weight, ((0, parts * each - rows), (0, 0))).reshape(parts, each, width)
        found = jax.tree.map(lambda value: value.reshape(parts * each, -1)[:rows], jax.lax.map(some, stacked))
    codes, *scales = found
    finite = jnp.isfinite(hessians[0]).all() & jnp.isfinite(hessians[1]).all()
    fine, coarse = (jnp.where(finite & jnp.isfinite(scale).all(), scale, jnp.nan) for scale in scales)
    return codes, fine, coarse


@functools.partial(jit, static_argnames="group")
def nearest_coarse(
    weight: Float[Array, "rows width"], codes: Int[Array, "rows width"], fine: Float[Array, "rows groups"], group: int
) -> Float[Array, "rows groups"]:
    """Scales of 3 bits, bfloat16, that come nearest to the weight itself for codes that were rounded to nearest."""
    rows, width = weight.shape
    shape = rows, fine.shape[1], group
    spare = ((0, 0), (0, fine.shape[1] * group - width))
    usual = fine.astype(jnp.float32)
    apart = jnp.where(usual == 0, 1.0, usual)[..., None]
    steps = jnp.pad(leading(codes.astype(jnp.float32)), spare).reshape(shape)
    wanted = jnp.pad(weight, spare).reshape(shape) / apart
    found = (steps * wanted).sum(-1) / jnp.maximum((steps * steps).sum(-1), 1e-6)
    return (jnp.where(found > 0, found, 2.0) * usual).astype(jnp.bfloat16)
