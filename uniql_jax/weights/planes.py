"""Bit planes of nested codes: packing, values, and products that expand a block of them at a time."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from uniql_jax.weights.protocol import DenseArray

PLANES = 3
"""Of one bit each, the most significant first, that make up the leading bits."""
OFFSET = 0.25
"""What a leading integer h stands for beyond itself, in its own steps: half way between codes 2 h and 2 h + 1."""
BYTE = 8
BLOCK = 1 << 20
"""Weights that are dense at a time."""


def values_of(
    leading: UInt8[Array, "*b planes n"], last: UInt8[Array, "*b n"] | None, scale: Float[Array, "*b g"], group: int
) -> Float[Array, "*b w"]:
    """Values of planes whose last axis is contracted; `last` None: of the leading bits alone."""
    bits = bits_of(leading).astype(jnp.int32)
    high = sum(bits[..., i, :] << (PLANES - 1 - i) for i in range(PLANES)) - 4
    if last is None:
        steps = jnp.asarray(high, jnp.float32) + OFFSET
    else:
        steps = (2 * high + bits_of(last)).astype(jnp.float32)
    return steps * jnp.repeat(scale.astype(jnp.float32), group, axis=-1)


def bits_of(plane: UInt8[Array, "*b n"]) -> UInt8[Array, "*b w"]:
    """The bits of planes, eight for every byte of the last axis."""
    found = (plane[..., None] >> jnp.arange(BYTE, dtype=jnp.uint8)) & 1
    return found.reshape(*plane.shape[:-1], plane.shape[-1] * BYTE)


def plane_of(bits: Int[Array, "*b w"]) -> UInt8[Array, "*b n"]:
    """Inverse of `bits_of`."""
    groups = bits.astype(jnp.uint8).reshape(*bits.shape[:-1], bits.shape[-1] // BYTE, BYTE)
    return (groups << jnp.arange(BYTE, dtype=jnp.uint8)).sum(-1, dtype=jnp.uint8)


@jax.jit
def rows_product(weight: Any, x: Float[Array, "*b h"]) -> Float[Array, "*b out"]:
    """`NestedArray.rows` of a weight whose entries have all bits, or none of which has."""
    rows, whole = math.prod(weight.shape[:-1]), bool(weight.full)
    scale = (weight.fine if whole else weight.coarse).reshape(rows, -1)
    leading = weight.leading.reshape(rows, PLANES, -1)
    last = weight.last.reshape(rows, -1) if whole else None
    size = max(1, min(rows, BLOCK // max(1, weight.width)))

    def some(start: Any, count: int) -> Array:
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=count)
        value = values_of(cut(leading), None if last is None else cut(last), cut(scale), weight.group)
        return DenseArray(value[:, : weight.width].astype(x.dtype)).rows(x)

    blocks = rows // size
    found = jax.lax.map(lambda i: some(i * size, size), jnp.arange(blocks)) if blocks > 1 else some(0, size)[None]
    found = jnp.moveaxis(found, 0, -2).reshape(*x.shape[:-1], blocks * size)
    return jnp.concatenate([found, some(blocks * size, rows % size)], axis=-1) if rows % size else found


@jax.jit
def columns_product(weight: Any, flat: Float[Array, "*b k"]) -> Float[Array, "*b h"]:
    """`NestedArray.columns` of a weight whose entries have all bits, or none of which has."""
    whole, features = bool(weight.full), weight.shape[-1]
    scale = weight.fine if whole else weight.coarse
    groups, group = scale.shape[0], weight.group
    flat = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, groups * group - weight.width)])
    size = max(1, min(groups, BLOCK // max(1, group * features)))

    def some(start: Any, count: int) -> Array:
        def cut(value: Array, each: int, axis: int = 0) -> Array:
            return jax.lax.dynamic_slice_in_dim(value, start * each, count * each, axis)

        bytes_ = group // BYTE
        leading = cut(weight.leading, bytes_).swapaxes(0, 2)  # what is contracted goes last
        last = cut(weight.last, bytes_).T if whole else None
        value = values_of(leading, last, cut(scale, 1).T, group)
        return DenseArray(value.astype(flat.dtype)).rows(cut(flat, group, flat.ndim - 1))

    blocks = groups // size
    if blocks > 1:
        start = jnp.zeros((*flat.shape[:-1], features), jnp.float32)
        found = jax.lax.fori_loop(0, blocks, lambda i, total: total + some(i * size, size), start)
    else:
        found = some(0, size)
    return found + some(blocks * size, groups % size) if groups % size else found
