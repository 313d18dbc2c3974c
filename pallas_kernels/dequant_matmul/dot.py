"""Many rows of x times a 4-bit weight: a tile of words becomes eight bf16 tiles in registers, the A of eight wgmma.

The k-th weights of all words of a group make one tile [n, 16], unpacked from pairs of words without moving anything
between threads; x is laid out once, outside, so that its k-th columns are neighbours.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
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

WORDS = 16
"""Words of one row that a step unpacks: K of eight products."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Tile sizes (powers of two) and how a program runs."""

    tile_n: int = 128
    tile_m: int = 64
    warps: int = 8
    stages: int = 3
    split: int = 1
    fold: bool = False
    """Scale the weights, rounding them to bf16 as dequantizing does, rather than each group's sum."""
    rows_inner: bool = False
    """Neighbouring programs take neighbouring tiles of x, so that a weight tile is read once from memory."""
    join: int = 1
    """Planes (1, 2, 4 or 8) that one product takes: 16 contracted weights each."""


def _plane(words: Int[Array, "n 16"], k: int, scale: Float[Array, "n 16"] | None) -> Float[Array, "n 16"]:
    """The k-th weight of each word, q - 8 (times `scale`), in bf16."""
    if compat.interpreted():
        plane = (((words >> SHIFTS[k]) & 0xF) - 8).astype(jnp.bfloat16)
        return plane if scale is None else plane * scale
    # Two words a time: their low (or high) halves side by side, then one shift, one and-or, one subtraction a pair.
    lines = [
        "{ .reg .b32 w, m, e;",
        f"prmt.b32 w, $1, $2, {0x7632 if k % 2 else 0x5410};",
        f"shr.u32 w, w, {4 * (k // 2)};",
        "mov.b32 m, 0x000F000F; mov.b32 e, 0x43004300; lop3.b32 w, w, m, e, 0xEA;",
        "mov.b32 m, 0x3F803F80; mov.b32 e, 0xC308C308; fma.rn.bf16x2 w, w, m, e;",
        "mov.b32 $0, w; }" if scale is None else "mov.b32 m, 0x80008000; fma.rn.bf16x2 $0, w, $3, m; }",
    ]
    [plane] = compat.triton().elementwise_inline_asm(
        " ".join(lines),
        args=[words] if scale is None else [words, scale],
        constraints="=r,r,r" if scale is None else "=r,r,r,r",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, jnp.bfloat16)],
    )
    return plane


def side_by_side(planes: list[Array]) -> Float[Array, "n joined"]:
    """Planes [n, 16] as one [n, 16 * len(planes)]; no number need move to another thread."""
    joined = stacked(planes)
    return joined.transpose(0, *range(2, joined.ndim), 1).reshape(joined.shape[0], -1) if joined.ndim > 2 else joined


def multiply(values: Float[Array, "n k"], x: Float[Array, "k m"]) -> Float[Array, "n m"]:
    return jax.lax.dot_general(values, x, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _adder(
    refs: Sequence[Any], n: Int[Array, " n"], m: Int[Array, " m"], weight: Weight, settings: Settings
) -> Callable[[Array, Array], Float[Array, "n m"]]:
    """(group, sum) -> the sum plus a group's product, for rows n of the weight and m of x; refs: x, data, scale."""
    x_ref, data_ref, scale_ref = refs
    words = weight.group // 8
    steps = pl.cdiv(words, WORDS)
    first = weight.layout == "first"
    tile, row, word = n[:, None] // tiling.ROWS, n[:, None] % tiling.ROWS, jnp.arange(WORDS)

    def add(group: Array, total: Array) -> Array:
        scale = scale_ref[group, n] if first or weight.layout == "groups" else scale_ref[n, group]
        spread = jnp.broadcast_to(scale[:, None], (settings.tile_n, WORDS)) if settings.fold else None
        part = total if settings.fold else jnp.zeros_like(total)
        for step in range(steps):
            # Words past the group meet zeros of x; they need only lie inside the array.
            at = step * WORDS + word
            at = group * words + (jnp.minimum(at, words - 1) if (step + 1) * WORDS > words else at)
            if weight.layout in tiling.CONTRACTS:
                major = (tile, group) if weight.layout == "rows" else (group, tile)
                packed = data_ref[(*major, row, word[None, :])]
            else:
                packed = data_ref[at[None, :], n[:, None]] if first else data_ref[n[:, None], at[None, :]]
            for k in range(0, 8, settings.join):
                planes = [_plane(packed, k + i, spread) for i in range(settings.join)]
                column = (group * steps + step) * 8 * WORDS + k * WORDS + jnp.arange(settings.join * WORDS)
                part += multiply(side_by_side(planes), x_ref[m[None, :], column[:, None]])
        return part if settings.fold else total + part * scale.astype(jnp.float32)[:, None]

    return add


def _kernel(*refs: Any, weight: Weight, settings: Settings, adder: Callable[..., Callable[..., Array]]) -> None:
    """refs: x bf16 [count, K] as `arrange` lays it out, data, scale, (waited for,) out [split, count, N]."""
    out_ref, count = refs[-1], refs[0].shape[0]
    at_n, at_m, share = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    if settings.rows_inner:
        at_n, at_m = at_m, at_n
    n = at_n * settings.tile_n + jnp.arange(settings.tile_n)
    m = at_m * settings.tile_m + jnp.arange(settings.tile_m)
    n_read, m_read = jnp.minimum(n, weight.features - 1), jnp.minimum(m, count - 1)
    add = adder(refs[:3], n_read, m_read, weight, settings)
    zeros = jnp.zeros((settings.tile_n, settings.tile_m), jnp.float32)
    per_share = pl.cdiv(weight.groups, settings.split)
    rounds = jnp.minimum(per_share, weight.groups - share * per_share)
    rounds = per_share if weight.groups % settings.split == 0 else rounds
    total = jax.lax.fori_loop(0, rounds, lambda index, total: add(share * per_share + index, total), zeros)
    mask = (n < weight.features)[:, None] & (m < count)[None, :]
    compat.store(out_ref, (share, m[None, :], n[:, None]), total, mask)


def arrange(x: Float[Array, "count width"], weight: Weight) -> Float[Array, "count padded"]:
    """x padded to whole steps of 16 words, and within a step the k-th columns of all words together.

    Words of tiles come in the order in which a row of a tile holds them.
    """
    words = weight.group // 8
    padded = -(-words // WORDS) * WORDS
    x = x.reshape(x.shape[0], weight.groups, words, 8)
    if weight.layout in tiling.CONTRACTS:
        x = x.reshape(x.shape[0], weight.groups, 4, 4, 8).swapaxes(2, 3).reshape(x.shape)
    if padded != words:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, padded - words), (0, 0)))
    return x.reshape(x.shape[0], -1, WORDS, 8).swapaxes(2, 3).reshape(x.shape[0], -1)


def supported(weight: Weight) -> None:
    """Raise NotImplementedError for what the kernel cannot do."""
    if weight.bits != 4 and weight.layout not in tiling.CONTRACTS:
        raise NotImplementedError(f"{weight.bits} bits come in tiles alone, not in layout {weight.layout!r}")
    if weight.group % 8:
        raise NotImplementedError(f"a group of {weight.group} splits a word of eight weights")


def product(
    x: Float[Array, "count width"],
    data: Int[Array, "..."],
    scale: Float[Array, "c d"],
    *,
    weight: Weight,
    settings: Settings,
    after: Array | None = None,
    arrange: Callable[..., Array] = arrange,
    adder: Callable[..., Callable[..., Array]] = _adder,
) -> Float[Array, "split count features"]:
    """x [count, groups * group] bf16 times the weight: [1, count, features] bf16, or [split, ...] float32 parts.

    `after`: see mma.product; `arrange` and `adder`: what another number of bits replaces. Raises NotImplementedError
    for what the kernel cannot do.
    """
    supported(weight)
    dtype = jnp.float32 if settings.split > 1 else jnp.bfloat16
    if weight.layout in tiling.CONTRACTS and weight.bits == 4:
        data = tiling.by_row(data)
    refs = (arrange(x, weight), data, scale) + (() if after is None else (after,))
    grid = (pl.cdiv(weight.features, settings.tile_n), pl.cdiv(x.shape[0], settings.tile_m))
    return compat.call(
        functools.partial(_kernel, weight=weight, settings=settings, adder=adder),
        name=f"dequant_dot_{weight.layout}" + ("" if weight.bits == 4 else f"_{weight.bits}"),
        grid=(*(grid[::-1] if settings.rows_inner else grid), settings.split),
        out_shape=jax.ShapeDtypeStruct((settings.split, x.shape[0], weight.features), dtype),
        warps=settings.warps,
        stages=settings.stages,
    )(*refs)
