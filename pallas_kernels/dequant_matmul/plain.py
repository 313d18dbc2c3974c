"""The product for any dtype, bits, group and size: a tile becomes exact integers, is multiplied, then scaled per group.

Any M, any rows, any group: tiles are powers of two (as the Triton lowering wants) and their overhang is masked.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels import compat
from uniql_jax.pallas_kernels.compat import pl
from uniql_jax.pallas_kernels.dequant_matmul import tiling
from uniql_jax.pallas_kernels.packing import SHIFTS

LEAST_TILE = 16
"""Smallest side of a tensor core's tile."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """How the packed weight is laid out: the static half of every call."""

    bits: int
    group: int
    contract: str
    width: int
    layout: str = "plain"


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows of x, output features and stored elements that one step of a program covers."""

    m: int
    n: int
    stored: int


def tiles(count: int, features: int, weight: Weight) -> Tiles:
    """Sizes that serve any shape; a tuned table may replace them."""
    per_word = 8 if weight.bits == 4 else 1
    stored = min(pl.next_power_of_2(weight.group // per_word), 32 if weight.bits == 4 else 128)
    return Tiles(
        m=min(max(LEAST_TILE, pl.next_power_of_2(count)), 64),
        n=min(max(LEAST_TILE, pl.next_power_of_2(features)), 64),
        stored=max(LEAST_TILE, stored),
    )


def _kernel(x_ref: Any, data_ref: Any, scale_ref: Any, out_ref: Any, *, weight: Weight, tile: Tiles) -> None:
    count, width = x_ref.shape
    features = out_ref.shape[1]
    last = weight.contract == "last"
    per_word = 8 if weight.bits == 4 else 1
    group_stored = weight.group // per_word
    m = pl.program_id(1) * tile.m + jnp.arange(tile.m)
    n = pl.program_id(0) * tile.n + jnp.arange(tile.n)
    m_in, n_in = m < count, n < features
    # Exact for 4-bit and 8-bit integers, so that the only rounding is the float32 sum's and the output's.
    dtype = jnp.bfloat16 if x_ref.dtype == jnp.bfloat16 else jnp.float32
    precision = None if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST

    def one_group(group: Array, total: Array) -> Array:
        if last:
            scale = compat.load(scale_ref, (n, group), n_in)
        else:
            scale = compat.load(scale_ref, (group, n), n_in)
        part = jnp.zeros((tile.m, tile.n), jnp.float32)
        for start in range(0, group_stored, tile.stored):
            within = start + jnp.arange(tile.stored)
            at, at_in = group * group_stored + within, within < group_stored
            if last:
                packed = compat.load(data_ref, (n[:, None], at[None, :]), n_in[:, None] & at_in[None, :])
            else:
                packed = compat.load(data_ref, (at[:, None], n[None, :]), at_in[:, None] & n_in[None, :])
            for lane in range(per_word):
                k = at * per_word + lane
                # x beyond its width, and beyond the group, is read as zero: whatever the word holds there is nothing.
                x = compat.load(x_ref, (m[:, None], k[None, :]), m_in[:, None] & (at_in & (k < width))[None, :])
                integers = ((packed >> SHIFTS[lane]) & 0xF) - 8 if weight.bits == 4 else packed
                part += jax.lax.dot_general(
                    x.astype(dtype),
                    integers.astype(dtype),
                    (((1,), (1 if last else 0,)), ((), ())),
                    precision=precision,
                    preferred_element_type=jnp.float32,
                )
        return total + part * scale.astype(jnp.float32)[None, :]

    groups = scale_ref.shape[1 if last else 0]
    total = jax.lax.fori_loop(0, groups, one_group, jnp.zeros((tile.m, tile.n), jnp.float32))
    compat.store(out_ref, (m[:, None], n[None, :]), total, m_in[:, None] & n_in[None, :])


def product(
    x: Float[Array, "count width"], data: Int[Array, "..."], scale: Float[Array, "c d"], weight: Weight
) -> Float[Array, "count features"]:
    """x times a packed weight of 4 or 8 bits, in x's dtype; x is a 16-bit or 32-bit float."""
    features = scale.shape[0 if weight.contract == "last" else 1]
    data = tiling.plain(data, weight.layout, features)
    tile = tiles(x.shape[0], features, weight)
    return compat.call(
        functools.partial(_kernel, weight=weight, tile=tile),
        name=f"dequant_matmul_{weight.contract}_{weight.bits}",
        grid=(pl.cdiv(features, tile.n), pl.cdiv(x.shape[0], tile.m)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], features), x.dtype),
    )(x, data, scale)
