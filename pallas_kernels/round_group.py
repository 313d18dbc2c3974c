"""GPTQ of one group of columns in one kernel: the scale of every row is searched, then column after column is rounded.

Each column's error goes to the later ones of the group, so a plain program is a loop of small steps, and a GPU waits
longer for their launches than it computes. Here a program holds some rows of the group and walks over its columns.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels import compat
from uniql_jax.pallas_kernels.compat import pl

ELEMENTS = 4096
"""Of a group that a program holds."""
MOST_GROUP = 1024
"""Columns of a group: with more, a program would hold too few rows."""


def round_group(
    block: Float[Array, "group rows"],
    importance: Float[Array, " group"],
    square: Float[Array, "group group"],
    grid: Float[Array, " tries"],
    *,
    limits: tuple[int, int],
    smallest: float,
    return_unrounded: bool = False,
) -> tuple[
    Int[Array, "group rows"], Float[Array, " rows"], Float[Array, "group rows"], Float[Array, "group rows"] | None
]:
    """Round a group of columns, float32, and carry their errors over within it.

    Args:
        block: the columns; each row of the weight is one column here.
        importance: weight of each entry's squared error where the scale is searched.
        square: of the inverse Hessian's upper factor, the part of this group.
        grid: shrink factors of a row's scale, from its largest magnitude on.
        limits: smallest and largest integer.
        smallest: scales below twice this are 0.
        return_unrounded: return what was rounded as well.

    Returns:
        Integers (int8), scales that are exact in bfloat16, errors over the factor's diagonal, and what was rounded or
        None.

    Raises:
        NotImplementedError: where JAX has no Triton backend, the GPU is too old, or the group is too wide.
    """
    group, rows = block.shape
    if group > MOST_GROUP:
        raise NotImplementedError(f"a group of {group} columns is wider than {MOST_GROUP}")
    width = pl.next_power_of_2(group)
    tile = min(128, max(8, ELEMENTS // width))
    floats = jax.ShapeDtypeStruct((group, rows), jnp.float32)
    outs = [jax.ShapeDtypeStruct((group, rows), jnp.int8), jax.ShapeDtypeStruct((rows,), jnp.float32), floats]
    body = functools.partial(
        _kernel, group=group, rows=rows, width=width, tile=tile, tries=len(grid), limits=limits, smallest=smallest
    )
    found = compat.call(
        body,
        name=f"round_group_{group}",
        grid=(pl.cdiv(rows, tile),),
        out_shape=[*outs, floats] if return_unrounded else outs,
    )(block, importance, square, grid)
    return tuple(found) if return_unrounded else (*found, None)


def _rounded(values: Array) -> Array:
    """The nearest whole numbers, halves to even: Triton has no rounding."""
    floor = jnp.floor(values)
    rest, odd = values - floor, floor - 2 * jnp.floor(floor / 2)
    return floor + jnp.where((rest > 0.5) | ((rest == 0.5) & (odd == 1)), 1.0, 0.0)


def _kernel(
    block_ref: Any,
    importance_ref: Any,
    square_ref: Any,
    grid_ref: Any,
    codes_ref: Any,
    scales_ref: Any,
    errors_ref: Any,
    *unrounded_ref: Any,
    group: int,
    rows: int,
    width: int,
    tile: int,
    tries: int,
    limits: tuple[int, int],
    smallest: float,
) -> None:
    low, high = limits
    index, row = jnp.arange(width), pl.program_id(0) * tile + jnp.arange(tile)
    own, there = index < group, row < rows
    at, inside = (index[:, None], row[None, :]), own[:, None] & there[None, :]
    block = compat.load(block_ref, at, inside)
    importance = compat.load(importance_ref, (index,), own)

    def nearest(values: Array, inverse: Array) -> Array:
        return jnp.clip(_rounded(values * inverse), low, high)

    def inverse_of(scale: Array) -> Array:
        return jnp.where(scale == 0, 0.0, 1.0 / jnp.where(scale == 0, 1.0, scale))

    top, bottom = jnp.max(block, axis=0), jnp.min(block, axis=0)
    most = jnp.where(top > -bottom, top, bottom)
    most = jnp.where(jnp.abs(most / low) < 2 * smallest, 0.0, most)
    base, unit = most / low, jnp.where(most == 0, 1.0, most)

    def attempt(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        scale = (base * grid_ref[i]).astype(jnp.bfloat16).astype(jnp.float32)
        error = (block - nearest(block, inverse_of(scale)[None, :]) * scale[None, :]) / unit[None, :]
        cost = jnp.sum(error * error * importance[:, None], axis=0)
        better = cost < best[0]
        return jnp.where(better, cost, best[0]), jnp.where(better, scale, best[1])

    start = (jnp.full((tile,), jnp.inf, jnp.float32), jnp.zeros((tile,), jnp.float32))
    scale = jax.lax.fori_loop(0, tries, attempt, start)[1]
    inverse = inverse_of(scale)

    def column(j: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        block, codes, *before = state
        here = index[:, None] == j
        value = jnp.sum(jnp.where(here, block, 0.0), axis=0)
        integer = nearest(value, inverse)
        factors = compat.load(square_ref, (j, index), own)
        error = (value - integer * scale) / square_ref[j, j]
        later = jnp.where(index[:, None] > j, block - factors[:, None] * error[None, :], block)
        # Columns before j are done; column j itself keeps its error, which the later groups need.
        block = jnp.where(here, error[None, :], later)
        return block, jnp.where(here, integer[None, :], codes), *(jnp.where(here, value[None, :], b) for b in before)

    begin = (block, *(jnp.zeros_like(block) for _ in range(1 + len(unrounded_ref))))
    errors, codes, *before = jax.lax.fori_loop(0, group, column, begin)
    compat.store(codes_ref, at, codes, inside)
    compat.store(errors_ref, at, errors, inside)
    compat.store(scales_ref, (row,), scale, there)
    for ref, value in zip(unrounded_ref, before, strict=True):
        compat.store(ref, at, value, inside)
