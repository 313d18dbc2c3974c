"""Dequantize a block that fits the cache, multiply, go on: what runs on a CPU, and wherever no kernel does.

The reference writes the whole dense weight to memory and reads it back; a block never leaves a CPU's cache, and needs
no memory to speak of on other devices.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels import packing
from uniql_jax.pallas_kernels.dequant_matmul import three_bit, tiling

BLOCK = 512
"""Rows ("last") or about as many contracted weights ("first") that are dequantized at a time: what a CPU's cache
holds."""
WIDE = 4096
"""The same on other devices, which are idle while a block is small."""
FEW = 16
"""Up to so many rows of x, a product is bound by reading the weight."""
LARGE = 1 << 21
"""Weights from which, with many rows of x, blocks beat one dense weight."""


def block_rows() -> int:
    """BLOCK or WIDE, whichever is for this backend."""
    return BLOCK if jax.default_backend() == "cpu" else WIDE


def _rows(
    x: Float[Array, "count width"],
    data: Int[Array, "rows stored"],
    scale: Float[Array, "rows groups"],
    *,
    bits: int,
    group: int,
    width: int,
) -> Float[Array, "count rows"]:
    """X Wᵀ for one block of rows; x is float32."""
    dims = (((1,), (1,)), ((), ()))
    if x.shape[0] > FEW or (bits == 4 and group % 8):
        weight = packing.dequantize_last(data, scale, bits=bits, group=group, width=width)
        return jax.lax.dot_general(x, weight, dims)
    spread = jnp.repeat(scale.astype(jnp.float32), group // (8 if bits == 4 else 1), axis=1)
    x = jnp.pad(x, ((0, 0), (0, scale.shape[1] * group - width)))
    if bits == 8:
        return jax.lax.dot_general(x, data.astype(jnp.float32) * spread, dims)

    def lane(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        # One plane, the k-th weights of all words, melts into its dot: no dense weight is ever written.
        plane, shift = part
        weight = (((data >> shift) & 0xF) - 8).astype(jnp.float32) * spread
        return total + jax.lax.dot_general(plane, weight, dims), None

    planes = jnp.moveaxis(x.reshape(x.shape[0], -1, 8), 2, 0)
    shifts = jnp.asarray(packing.SHIFTS, jnp.int32)
    return jax.lax.scan(lane, jnp.zeros((x.shape[0], data.shape[0]), jnp.float32), (planes, shifts))[0]


def _last(x: Array, data: Array, scale: Array, *, bits: int, group: int, width: int) -> Array:
    rows = data.shape[0]
    size = min(block_rows(), max(1, -(-rows // 2)))  # at least two blocks, so that no whole matrix is held
    whole = rows // size
    cut = whole * size

    def block(parts: tuple[Array, Array]) -> Array:
        return _rows(x, *parts, bits=bits, group=group, width=width)

    blocks = data[:cut].reshape(whole, size, -1), scale[:cut].reshape(whole, size, -1)
    out = jnp.moveaxis(jax.lax.map(block, blocks), 0, 1).reshape(x.shape[0], cut)
    return out if cut == rows else jnp.concatenate([out, block((data[cut:], scale[cut:]))], axis=1)


def _first(x: Array, data: Array, scale: Array, *, bits: int, group: int, width: int) -> Array:
    groups = scale.shape[0]
    x = jnp.pad(x, ((0, 0), (0, groups * group - width)))
    whole_words = 8 // math.gcd(8, group) if bits == 4 else 1  # groups that end where a word does
    per_block = -(-max(1, min(block_rows(), -(-groups * group // 2)) // group) // whole_words) * whole_words

    def block(start: int | Array, size: int) -> Array:
        first, stored = start * group, packing.words(size * group, bits)
        part = jax.lax.dynamic_slice_in_dim(data, first // 8 if bits == 4 else first, stored)
        of_part = jax.lax.dynamic_slice_in_dim(scale, start, size)
        weight = packing.dequantize_first(part, of_part, bits=bits, group=group, width=size * group)
        return jax.lax.dynamic_slice_in_dim(x, start * group, size * group, axis=1) @ weight

    whole = groups // per_block
    if whole < 1:
        return block(0, groups)
    left = groups - whole * per_block
    total = block(whole * per_block, left) if left else jnp.zeros((x.shape[0], data.shape[1]), jnp.float32)
    return jax.lax.scan(
        lambda total, index: (total + block(index * per_block, per_block), None), total, jnp.arange(whole)
    )[0]


def dequant_matmul(
    x: Float[Array, "*lead width"],
    data: Int[Array, "..."],
    scale: Float[Array, "c d"],
    *,
    bits: int,
    group: int,
    contract: str,
    width: int,
    layout: str = "plain",
) -> Float[Array, "*lead out"]:
    """See api.dequant_matmul.

    Raises NotImplementedError where there is nothing to multiply, and on a CPU where the reference is faster.
    """
    features = scale.shape[0 if contract == "last" else 1]
    if bits == three_bit.BITS:
        return _three_bit(x, data, scale, contract=contract)
    data = tiling.plain(data, layout, features)
    if x.size == 0 or scale.size == 0:
        raise NotImplementedError("nothing to multiply")
    flat = x.reshape(-1, width).astype(jnp.float32)
    if jax.default_backend() == "cpu" and flat.shape[0] > FEW and width * features < LARGE:
        raise NotImplementedError("a dense weight of this size stays in the cache")
    product = _last if contract == "last" else _first
    # Full float32 where the caller's numbers are: a GPU's default would be TF32.
    with jax.default_matmul_precision("highest" if x.dtype in (jnp.float32, jnp.float64) else "default"):
        out = product(flat, data, scale, bits=bits, group=group, width=width)
    return out.reshape(*x.shape[:-1], features).astype(x.dtype)


def _three_bit(
    x: Float[Array, "*lead width"], data: Int[Array, "..."], scale: Float[Array, "c d"], *, contract: str
) -> Float[Array, "*lead out"]:
    """The same for tiles of 3 bits: some row tiles are dense at a time."""
    if contract == "first":
        data, scale = data.swapaxes(0, 1), scale.T
    rows, groups = scale.shape
    size = max(1, min(block_rows() // tiling.ROWS, len(data)))
    short = -len(data) % size
    data = jnp.pad(data, ((0, short), *[(0, 0)] * 4)).reshape(-1, size, *data.shape[1:])
    scale = jnp.pad(scale, ((0, data.shape[0] * size * tiling.ROWS - rows), (0, 0)))
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    flat = jnp.pad(flat, ((0, 0), (0, groups * tiling.GROUP - flat.shape[1])))

    def block(parts: tuple[Array, Array]) -> Array:
        return jax.lax.dot_general(flat, three_bit.dequantize(*parts, "last"), (((1,), (1,)), ((), ())))

    with jax.default_matmul_precision("highest" if x.dtype in (jnp.float32, jnp.float64) else "default"):
        out = jax.lax.map(block, (data, scale.reshape(len(data), -1, groups)))
    out = jnp.moveaxis(out, 0, 1).reshape(len(flat), -1)[:, :rows]
    return out.reshape(*x.shape[:-1], rows).astype(x.dtype)
