"""Many rows of x times a 3-bit weight: tiles of words become bf16 in registers, or a dense bf16 weight in memory.

In both, a thread unpacks the 32 weights of a row, group and lane of the tile.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels import compat
from uniql_jax.pallas_kernels.compat import pl
from uniql_jax.pallas_kernels.dequant_matmul import dequantize, dot, three_bit, tiling
from uniql_jax.pallas_kernels.dequant_matmul.dot import Settings
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight

LANES = 4
"""Of a row in a group: 32 contracted weights each, in pieces of 8 that take turns."""


def _unpacked(words: list[Int[Array, "*b"]]) -> list[Float[Array, "*b"]]:
    """The 32 weights of three words, h - 3.75 in bf16, in the order of the contraction."""
    found = []
    for pair in three_bit.pairs_of(words):
        for half in (0, 16):
            # 8 + h is an `or` of the highest bits of a mantissa with the exponent of 8.
            raw = (((pair >> half) & 7) << 4 | 0x4100).astype(jnp.int16)
            found.append(jax.lax.bitcast_convert_type(raw, jnp.bfloat16) - jnp.bfloat16(8 + three_bit.CENTRE))
    return found


def _load(data_ref: Any, weight: Weight, tile: Array, group: Array, row: Array, lane: Array) -> list[Array]:
    """Three words of rows `row` of row tiles `tile`."""
    pair, at = group // three_bit.SPAN, group % three_bit.SPAN
    major = (tile, pair) if weight.layout == "rows" else (pair, tile)
    late = three_bit.SPAN * (row // 8) + at
    return [data_ref[(*major, word, LANES * (row % 8) + lane, late)] for word in range(three_bit.WORDS)]


def _dot_kernel(*refs: Any, weight: Weight, settings: Settings) -> None:
    """refs: x bf16 [count, groups * 128] as `arrange` lays it out, data, scale, (waited for,) out [split, count, N]."""
    x_ref, data_ref, scale_ref, out_ref = *refs[:3], refs[-1]
    count = x_ref.shape[0]
    at_n, at_m, share = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    if settings.rows_inner:
        at_n, at_m = at_m, at_n
    n = at_n * settings.tile_n + jnp.arange(settings.tile_n)
    m = at_m * settings.tile_m + jnp.arange(settings.tile_m)
    n_read, m_read = jnp.minimum(n, weight.features - 1), jnp.minimum(m, count - 1)
    tile, row, lane = n_read[:, None] // tiling.ROWS, n_read[:, None] % tiling.ROWS, jnp.arange(LANES)[None, :]
    per_share = pl.cdiv(weight.groups, settings.split)

    def one_group(index: Array, total: Array) -> Array:
        group = share * per_share + index
        scale = scale_ref[(n_read, group) if weight.layout == "rows" else (group, n_read)]
        words = _load(data_ref, weight, tile, group, row, lane)
        # Scaled when they are one matrix: Triton for Blackwell fails on an operand that is but reshaped.
        values = dot.side_by_side(_unpacked(words)) * scale[:, None]
        column = group * tiling.GROUP + jnp.arange(tiling.GROUP)
        return total + jax.lax.dot_general(
            values,
            x_ref[m_read[None, :], column[:, None]],
            (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )

    rounds = jnp.clip(weight.groups - share * per_share, 0, per_share)
    zeros = jnp.zeros((settings.tile_n, settings.tile_m), jnp.float32)
    total = jax.lax.fori_loop(0, per_share if weight.groups % settings.split == 0 else rounds, one_group, zeros)
    mask = (n < weight.features)[:, None] & (m < count)[None, :]
    compat.store(out_ref, (share, m[None, :], n[:, None]), total, mask)


def arrange(x: Float[Array, "count width"], weight: Weight) -> Float[Array, "count width"]:
    """x with the k-th columns of a group's lanes next to one another."""
    return x.reshape(x.shape[0], weight.groups, 4, LANES, 8).swapaxes(3, 4).reshape(x.shape)


def product(
    x: Float[Array, "count width"],
    data: Int[Array, "..."],
    scale: Float[Array, "c d"],
    *,
    weight: Weight,
    settings: Settings,
    after: Array | None = None,
) -> Float[Array, "split count features"]:
    """dot.product for 3 bits; weights are always scaled, and rounded to bf16, before they are multiplied."""
    dtype = jnp.float32 if settings.split > 1 else jnp.bfloat16
    refs = (arrange(x, weight), data, scale) + (() if after is None else (after,))
    grid = (pl.cdiv(weight.features, settings.tile_n), pl.cdiv(x.shape[0], settings.tile_m))
    return compat.call(
        functools.partial(_dot_kernel, weight=weight, settings=settings),
        name=f"dequant_dot_{weight.layout}_3",
        grid=(*(grid[::-1] if settings.rows_inner else grid), settings.split),
        out_shape=jax.ShapeDtypeStruct((settings.split, x.shape[0], weight.features), dtype),
        warps=settings.warps,
        stages=settings.stages,
    )(*refs)


def _dense_kernel(
    data_ref: Any, scale_ref: Any, out_ref: Any, *, weight: Weight, settings: dequantize.Settings
) -> None:
    """refs: data, scale, out bf16 [features, groups * 128]."""
    tile, thread = pl.program_id(0), jnp.arange(tiling.ROWS * LANES * settings.groups)
    group = pl.program_id(1) * settings.groups + thread // (tiling.ROWS * LANES)
    row, lane = thread % (tiling.ROWS * LANES) // LANES, thread % LANES
    n = tiling.ROWS * tile + row
    inside = (n < weight.features) & (group < weight.groups)
    n_read, group_read = jnp.minimum(n, weight.features - 1), jnp.minimum(group, weight.groups - 1)
    scale = scale_ref[(n_read, group_read) if weight.layout == "rows" else (group_read, n_read)]
    values = [value * scale for value in _unpacked(_load(data_ref, weight, tile, group_read, row, lane))]
    while len(values) > 1:  # neighbours in one thread: [..., 2, 2, 2, 2, 2], the first bit outermost
        half = len(values) // 2
        values = [jnp.stack([values[i], values[half + i]], axis=-1) for i in range(half)]
    byte, k = jnp.arange(4)[None, :, None], jnp.arange(8)[None, None, :]
    k = tiling.GROUP * group[:, None, None] + 8 * (LANES * byte + lane[:, None, None]) + k
    inside = jnp.broadcast_to(inside[:, None, None], k.shape)
    compat.store(out_ref, (n[:, None, None], k), values[0].reshape(k.shape), inside)


def dense(
    data: Int[Array, "..."], scale: Float[Array, "c d"], weight: Weight, settings: dequantize.Settings | None = None
) -> Float[Array, "features padded"]:
    """dequantize.dense for 3 bits."""
    settings = settings or dequantize.Settings()
    return compat.call(
        functools.partial(_dense_kernel, weight=weight, settings=settings),
        name=f"dequantize_{weight.layout}_3",
        grid=(pl.cdiv(weight.features, tiling.ROWS), pl.cdiv(weight.groups, settings.groups)),
        out_shape=jax.ShapeDtypeStruct((weight.features, weight.groups * weight.group), jnp.bfloat16),
        warps=settings.warps,
    )(data, scale)
