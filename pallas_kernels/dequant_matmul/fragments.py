"""How x reaches the threads of a warp that multiply it by mma.sync: as it is, in blocks, or laid out as fragments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels import compat
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight
from uniql_jax.pallas_kernels.dequant_matmul.warp import Operand, Threads


def fragments(x: Float[Array, "count width"], weight: Weight) -> Int[Array, "groups columns words 32 4"]:
    """x bf16 as the threads of a warp want it: int32 pairs [group, column tile, word, thread, pair of the word]."""
    words = weight.group // 8
    columns, steps = -(-x.shape[0] // 8), -(-words // 4)
    x = jnp.pad(x, ((0, 8 * columns - x.shape[0]), (0, 0))).reshape(columns, 8, weight.groups, words, 8)
    x = jnp.pad(x, ((0, 0),) * 3 + ((0, 4 * steps - words), (0, 0)))
    if weight.layout == "last":  # [column tile, row, group, lane, step, ...]
        parts = x.reshape(columns, 8, weight.groups, 4, steps, 8).transpose(2, 0, 4, 1, 3, 5)
    else:
        parts = x.reshape(columns, 8, weight.groups, steps, 4, 8).transpose(2, 0, 3, 1, 4, 5)
    halves = jax.lax.bitcast_convert_type(parts, jnp.uint16).astype(jnp.int32)
    halves = halves.reshape(weight.groups, columns, steps, 32, 4, 2)
    # As a bitcast to a wider type, XLA would reduce over the pairs, which on a GPU is another kind of kernel.
    return halves[..., 0] | (halves[..., 1] << 16)


def load_x(x_ref: Any, weight: Weight, at: Threads, group: Array, column: int) -> list[list[Operand]]:
    """x for one column tile: [word of the thread][half of the word], the first of two registers each.

    One 16-byte load a word of `fragments`, two of 8 bytes else.
    """
    loaded: list[list[Operand]] = []
    if x_ref.ndim == 5:  # as `fragments` lays it out
        held = [x_ref[group, column, i, 4 * at.row + at.lane, at.element] for i in range(x_ref.shape[2])]
        return [[(piece, 0), (piece, 2)] for piece in held]
    if x_ref.ndim == 4:  # as `in_blocks` lays it out
        loaded = []
        for i in range(4):
            block, word = (at.lane, i) if weight.layout == "last" else (i, at.lane)
            pieces = [x_ref[4 * group + block, column, at.row, 8 * word + start + at.element] for start in (0, 4)]
            loaded.append([(piece, 0) for piece in pieces])
        return loaded
    m = jnp.minimum(at.row + 8 * column, x_ref.shape[0] - 1)
    words = weight.group // 8
    for i in range(-(-words // 4)):
        word = 4 * at.lane + i if weight.layout == "last" else 4 * i + at.lane
        first = (group * words + word) * 8 + at.element
        pieces = []
        for start in (0, 4):
            if weight.layout == "first" and 4 * i + 4 > words:
                mask = jnp.broadcast_to(word < words, (at.row.shape[0], 4))
                pieces.append(compat.load(x_ref, (m, first + start), mask))
            else:
                pieces.append(x_ref[m, first + start])
        loaded.append([(piece, 0) for piece in pieces])
    return loaded
