"""A dense bf16 weight from a 4-bit one, for so many rows of x that the product is bound by arithmetic.

XLA unpacks a word to eight elements that lie apart from one another in the threads that write them, at a third of the
speed of a copy. Here each thread writes what it unpacks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels import compat
from uniql_jax.pallas_kernels.compat import pl
from uniql_jax.pallas_kernels.dequant_matmul import tiling
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight
from uniql_jax.pallas_kernels.dequant_matmul.warp import stacked
from uniql_jax.pallas_kernels.packing import SHIFTS


@dataclasses.dataclass(frozen=True)
class Settings:
    """Groups (a power of two) of one row tile that a program unpacks, and its warps."""

    groups: int = 4
    warps: int = 4


def _unpacked(
    data_ref: Any, weight: Weight, tile: Array, group: Array, row: Array, lane: Array
) -> list[Float[Array, "threads 4"]]:
    """The eight weights of four words of a row and group, q - 8 in bf16; data_ref: tiles by row."""
    # As in mma.py a thread loads four words in one piece: numbers lane, 4 + lane, 8 + lane, 12 + lane of a row's group.
    major = (tile, group[:, None]) if weight.layout == "rows" else (group[:, None], tile)
    packed = data_ref[(*major, row[:, None], 4 * lane[:, None] + jnp.arange(4)[None, :])]
    # bf16 has eight bits of mantissa: 128 + q is an `or` with the exponent of 128.
    raw = [(((packed >> shift) & 0xF) | 0x4300).astype(jnp.int16) for shift in SHIFTS]
    return [jax.lax.bitcast_convert_type(each, jnp.bfloat16) - jnp.bfloat16(136) for each in raw]


def _kernel(
    data_ref: Any,
    scale_ref: Any,
    out_ref: Any,
    *,
    weight: Weight,
    settings: Settings,
    unpacked: Callable[..., list[Array]],
) -> None:
    """refs: data, scale, out bf16 [features, K]."""
    tile, thread = pl.program_id(0), jnp.arange(64 * settings.groups)
    group = pl.program_id(1) * settings.groups + thread // 64
    row, lane = thread % 64 // 4, thread % 4
    n = tiling.ROWS * tile + row
    inside = (n < weight.features) & (group < weight.groups)
    n_read, group_read = jnp.minimum(n, weight.features - 1), jnp.minimum(group, weight.groups - 1)
    scale = scale_ref[(n_read, group_read) if weight.layout == "rows" else (group_read, n_read)]
    values = unpacked(data_ref, weight, tile, group_read, row, lane)
    if values[0].ndim == 2:
        scale = scale[:, None]
    # Eight neighbours in one thread, in four pieces that the lanes of a row take turns with.
    first = tiling.GROUP * group[:, None] + 8 * (4 * jnp.arange(4)[None, :] + lane[:, None])
    k = first[:, :, None] + jnp.arange(8)[None, None, :]
    inside = jnp.broadcast_to(inside[:, None, None], k.shape)
    compat.store(out_ref, (n[:, None, None], k), stacked([value * scale for value in values]).reshape(k.shape), inside)


def supported(weight: Weight) -> None:
    """Raise NotImplementedError for what the kernel cannot do."""
    if weight.layout not in tiling.CONTRACTS:
        raise NotImplementedError(f"only tiles are dequantized by a kernel, not layout {weight.layout!r}")


def dense(
    data: Int[Array, "..."],
    scale: Float[Array, "c d"],
    weight: Weight,
    settings: Settings | None = None,
    unpacked: Callable[..., list[Array]] = _unpacked,
) -> Float[Array, "features padded"]:
    """The weight in bf16, [features, groups * 128], each product of integer and scale rounded once.

    `unpacked`: what another number of bits replaces. Raises NotImplementedError for what the kernel cannot do.
    """
    supported(weight)
    settings = settings or Settings()
    return compat.call(
        functools.partial(_kernel, weight=weight, settings=settings, unpacked=unpacked),
        name=f"dequantize_{weight.layout}" + ("" if weight.bits == 4 else f"_{weight.bits}"),
        grid=(pl.cdiv(weight.features, tiling.ROWS), pl.cdiv(weight.groups, settings.groups)),
        out_shape=jax.ShapeDtypeStruct((weight.features, weight.groups * weight.group), jnp.bfloat16),
        warps=settings.warps,
    )(tiling.by_row(data) if weight.bits == 4 else data, scale)


def product(
    x: Float[Array, "count padded"],
    data: Int[Array, "..."],
    scale: Float[Array, "c d"],
    weight: Weight,
    settings: Settings | None = None,
    dense: Callable[..., Array] = dense,
) -> Float[Array, "count features"]:
    """x bf16 times the weight: one kernel that dequantizes it, and XLA's product."""
    values = dense(data, scale, weight, settings)
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, values, dims, preferred_element_type=jnp.float32).astype(x.dtype)
