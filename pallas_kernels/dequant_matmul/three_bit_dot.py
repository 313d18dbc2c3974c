"""Many rows of x times a 3-bit weight: tiles of words become bf16 in registers, or a dense bf16 weight in memory.

In both, a thread unpacks the 32 weights of a row, group and lane of the tile; the rest is dot.py's or dequantize.py's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels.dequant_matmul import dequantize, dot, three_bit, tiling
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight

LANES = 4
"""Of a row in a group: 32 contracted weights each, in pieces of 8 that take turns."""


def _unpacked(
    data_ref: Any, weight: Weight, tile: Array, group: Array, row: Array, lane: Array
) -> list[Float[Array, "*b"]]:
    """The 32 weights of rows `row` of row tiles `tile`, h - 3.75 in bf16, in the order of the contraction."""
    pair, at = group // three_bit.SPAN, group % three_bit.SPAN
    major = (tile, pair) if weight.layout == "rows" else (pair, tile)
    late = three_bit.SPAN * (row // 8) + at
    words = [data_ref[(*major, word, LANES * (row % 8) + lane, late)] for word in range(three_bit.WORDS)]
    found = []
    for each in three_bit.pairs_of(words):
        for half in (0, 16):
            # 8 + h is an `or` of the highest bits of a mantissa with the exponent of 8.
            raw = (((each >> half) & 7) << 4 | 0x4100).astype(jnp.int16)
            found.append(jax.lax.bitcast_convert_type(raw, jnp.bfloat16) - jnp.bfloat16(8 + three_bit.CENTRE))
    return found


def _adder(
    refs: Sequence[Any], n: Int[Array, " n"], m: Int[Array, " m"], weight: Weight, settings: dot.Settings
) -> Callable[[Array, Array], Float[Array, "n m"]]:
    """As dot.py's; weights are always scaled, and rounded to bf16, before they are multiplied."""
    x_ref, data_ref, scale_ref = refs
    tile, row, lane = n[:, None] // tiling.ROWS, n[:, None] % tiling.ROWS, jnp.arange(LANES)[None, :]

    def add(group: Array, total: Array) -> Array:
        scale = scale_ref[(n, group) if weight.layout == "rows" else (group, n)]
        # Scaled when they are one matrix: Triton for Blackwell fails on an operand that is but reshaped.
        values = dot.side_by_side(_unpacked(data_ref, weight, tile, group, row, lane)) * scale[:, None]
        column = group * tiling.GROUP + jnp.arange(tiling.GROUP)
        return total + dot.multiply(values, x_ref[m[None, :], column[:, None]])

    return add


def arrange(x: Float[Array, "count width"], weight: Weight) -> Float[Array, "count width"]:
    """x with the k-th columns of a group's lanes next to one another."""
    return x.reshape(x.shape[0], weight.groups, 4, LANES, 8).swapaxes(3, 4).reshape(x.shape)


product = functools.partial(dot.product, arrange=arrange, adder=_adder)
"""dot.product for 3 bits."""

dense = functools.partial(dequantize.dense, unpacked=_unpacked)
"""dequantize.dense for 3 bits."""
