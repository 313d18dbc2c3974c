"""Up to 16 rows of x times a 4-bit weight: words become bf16 pairs in registers and feed mma.sync as they are.

The weight is A (rows) of mma m16n8k16 and x its B (columns). No shared memory, no shuffle, until the warps that share
the contraction add up once at the end. Contracted weights may be visited in any order so long as x is
visited in the same, so each layout takes the order in which its loads are widest.

That thread i holds row i is how Triton lays out such a tensor, not a promise: `selfcheck.py` verifies it on the device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels import compat
from uniql_jax.pallas_kernels.compat import pl
from uniql_jax.pallas_kernels.dequant_matmul.fragments import fragments, load_x
from uniql_jax.pallas_kernels.dequant_matmul.tiling import CONTRACTS, Weight
from uniql_jax.pallas_kernels.dequant_matmul.warp import Operand, Threads, gate, multiply, pair, stacked, zero_point

MOST = 16
"""Rows of x: two column tiles of the mma."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the work is cut. `along_k` warps share a row tile's contraction, `along_n` take neighbouring row tiles."""

    along_k: int = 4
    along_n: int = 1
    batch: int = 1
    """Groups a warp loads before it computes."""
    tiles: int = 1
    """Row tiles of 16 (layout "last", "tiled") or of 32 ("first") a warp computes with the same x."""
    split: int = 1
    """Programs that share one row tile's contraction; their float32 parts are added by XLA."""
    zero: str = "fma"
    """How the 128 + 8 of a raw pair leaves: "fma", from every pair; "mma", as -136 times the sum of x, once a group."""
    gate: bool = False
    """Compute waits for a barrier that follows all loads of the batch; else ptxas sinks loads to their uses."""
    ordered: bool = False
    """x is first laid out as its fragments, by a kernel of XLA's: a warp then reads it in whole lines."""
    stream: bool = False
    """Words leave the first-level cache before x and the scales do."""


class Source(NamedTuple):
    """A row tile of a weight: its refs and its number."""

    data: Any
    scale: Any
    tile: Array


def _words(source: Source, weight: Weight, at: Threads, group: Array, settings: Settings) -> list[Array]:
    """The words of one group that a thread feeds, [threads, 4] each.

    Not "first": two tensors, rows `row` and `row` + 8 of the tile, whose elements are words. "first": one tensor per
    word, whose elements are four neighbouring columns.
    """
    data_ref, _, tile = source
    if weight.layout in ("rows", "groups"):
        major = (tile, group) if weight.layout == "rows" else (group, tile)
        places = [(*major, j, 4 * at.row + at.lane, at.element) for j in (0, 1)]
        return [compat.stream(data_ref, place) if settings.stream else data_ref[place] for place in places]
    if weight.layout == "last":
        n = jnp.minimum(16 * tile + at.row, weight.features - 1)
        low = jnp.minimum(16 * tile + at.row + 8, weight.features - 1)
        word = group * (weight.group // 8) + 4 * at.lane + at.element
        return [data_ref[n, word], data_ref[low, word]]
    n = 32 * tile + 4 * at.row
    n = jnp.where(n < weight.features, n, 0) + at.element
    words = weight.group // 8
    loaded = []
    for start in range(0, words, 4):
        word = start + at.lane
        # Words past the group meet zeros of x; they need only lie inside the array.
        word = word if start + 4 <= words else jnp.minimum(word, words - 1)
        loaded.append(data_ref[group * words + word, n])
    return loaded


def _steps(weight: Weight, pairs: list[list[Array]], x: list[list[Operand]], part: int) -> list[tuple[Any, Operand]]:
    """The mma of one 16-row tile over one group: fragments of A from `pairs`, and their x."""
    steps = []
    for i, halves in enumerate(x):
        for half, b in enumerate(halves):
            if weight.layout == "first":
                even, odd = pairs[i][2 * half], pairs[i][2 * half + 1]
                steps.append((((even, 2 * part), (even, 2 * part + 1), (odd, 2 * part), (odd, 2 * part + 1)), b))
            else:
                steps.append((tuple((pairs[row][2 * half + late], i) for late in (0, 1) for row in (0, 1)), b))
    return steps


def scales_of(source: Source, weight: Weight, at: Threads, group: Array) -> list[Array]:
    """The scale of each element of the accumulator, float32 [threads, 4], for each 16-row part of a tile."""
    _, scale_ref, tile = source
    if weight.layout == "first":
        rows = [32 * tile + 4 * at.row + j for j in range(4)]
    else:
        rows = [16 * tile + at.row, 16 * tile + at.row + 8]
    of_row = []
    for n in rows:
        n = jnp.minimum(n, weight.features - 1)
        index = (group, n) if weight.layout in ("first", "groups") else (n, group)
        of_row.append(scale_ref[index].astype(jnp.float32))
    upper = at.element < 2
    return [jnp.where(upper, of_row[i], of_row[i + 1]) for i in range(0, len(of_row), 2)]


def accumulate(
    x_ref: Any, sources: Sequence[Source], weight: Weight, settings: Settings, at: Threads, columns: int, share: Any = 0
) -> list[Float[Array, "threads 4"]]:
    """What each warp finds of every source's product with x: accumulators [source][part][column tile], in one list.

    All sources have the layout and the groups of `weight`; `columns` tiles of 8 rows of x. A warp's share of the
    contraction is not yet added to that of the others.
    """
    threads, parts = at.row.shape[0], parts_of(weight)
    stride = settings.along_k * settings.batch
    ragged = weight.groups % (stride * settings.split) != 0
    zeros = jnp.zeros((threads, 4), jnp.float32)

    def groups_of(index: Array) -> list[tuple[Array, Array]]:
        """The groups of a batch, and whether each exists; a batch past the end repeats the last."""
        start = (index * settings.split + share) * stride + at.warp_k
        groups = [start + u * settings.along_k for u in range(settings.batch)]
        return [(jnp.minimum(g, weight.groups - 1) if ragged else g, g < weight.groups) for g in groups]

    def step(index: Array, sums: Sequence[Array]) -> list[Array]:
        groups, sums = groups_of(index), list(sums)
        words = [[_words(source, weight, at, group, settings) for source in sources] for group, _ in groups]
        scales = [[scales_of(source, weight, at, group) for source in sources] for group, _ in groups]
        xs = [[load_x(x_ref, weight, at, group, column) for column in range(columns)] for group, _ in groups]
        mask = gate(index, threads) if settings.gate else None
        for u, (_, inside) in enumerate(groups):
            base = [zero_point(x, zeros) if settings.zero == "mma" else zeros for x in xs[u]]
            slot = 0
            for r in range(len(sources)):
                pairs = [[pair(word, j, settings.zero == "fma", mask) for j in range(4)] for word in words[u][r]]
                for part in range(parts):
                    for column in range(columns):
                        product = multiply(_steps(weight, pairs, xs[u][column], part), base[column])
                        if ragged:  # a repeated group must add nothing, not even 0 * inf
                            product = jnp.where(inside, product, 0.0)
                        sums[slot] = sums[slot] + product * scales[u][r][part]
                        slot += 1
        return sums

    rounds = pl.cdiv(weight.groups, stride * settings.split)
    return jax.lax.fori_loop(0, rounds, step, [zeros] * (len(sources) * parts * columns))


def add_up(totals: Sequence[Float[Array, "threads 4"]], along_k: int) -> tuple[Float[Array, "..."], Int[Array, "..."]]:
    """Add up the warps that share a contraction, all accumulators in one pass.

    Returns them joined along new last axes, [threads / along_k, 4, 2, 2, ...], and the number that each position there
    has in `totals`, of shape [1, 1, 2, 2, ...].
    """
    # Bit b of an accumulator's number is the axis b from the end; their count is made a power of two.
    bits = (len(totals) - 1).bit_length()
    level = [*totals, *[totals[0]] * (2**bits - len(totals))]
    total = stacked(level)
    if along_k > 1:
        total = total.reshape(along_k, -1, *total.shape[1:]).sum(0)
    number: Any = jnp.zeros((1, 1) + (1,) * bits, jnp.int32)
    for axis, bit in enumerate(reversed(range(bits))):
        shape = (1,) * (2 + axis) + (2,) + (1,) * (bits - 1 - axis)
        number = number + (jax.lax.broadcasted_iota(jnp.int32, shape, 2 + axis) << bit)
    return total, number


def parts_of(weight: Weight) -> int:
    """16-row parts of a row tile."""
    return 2 if weight.layout == "first" else 1


def places(
    weight: Weight, at: Threads, tile: Array | int, part: Array | int, column: Array | int, bits: int = 0
) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """Row n of the weight and row m of x of an accumulator's elements, with `bits` axes more behind."""
    outer = (..., *(None,) * bits)
    late, odd = (at.element // 2)[outer], (at.element % 2)[outer]
    row, lane = at.row[outer], at.lane[outer]
    within = 4 * row + 2 * part + late if parts_of(weight) == 2 else row + 8 * late
    return 16 * parts_of(weight) * tile + within, 8 * column + 2 * lane + odd


def row_tiles(weight: Weight) -> int:
    """Row tiles of a weight, the last one perhaps not full."""
    return pl.cdiv(weight.features, 16 * parts_of(weight))


def _kernel(
    *refs: Any, weight: Weight, settings: Settings, accumulate: Callable[..., list[Float[Array, "threads 4"]]]
) -> None:
    """refs: x [count, K] or its fragments, data, scale, (what the call waits for,) out [split, count, features]."""
    x_ref, data_ref, scale_ref, out_ref = *refs[:3], refs[-1]
    count = out_ref.shape[1]
    columns = 1 if count <= 8 else 2
    block, share = pl.program_id(0), pl.program_id(1)
    at = Threads.make(settings.along_k, settings.along_n)
    first_tile = (block * settings.along_n + at.warp_n) * settings.tiles
    tiles = [jnp.minimum(first_tile + r, row_tiles(weight) - 1) for r in range(settings.tiles)]
    sources = [Source(data_ref, scale_ref, tile) for tile in tiles]
    total, slot = add_up(accumulate(x_ref, sources, weight, settings, at, columns, share), settings.along_k)
    at = Threads.make(1, settings.along_n)
    bits, parts = total.ndim - 2, parts_of(weight)
    column, part, r = slot % columns, slot // columns % parts, slot // (columns * parts)
    warp = at.warp_n[(..., *(None,) * bits)]
    tile = (block * settings.along_n + warp) * settings.tiles + r
    n, m = places(weight, at, tile, part, column, bits)
    n, m = jnp.broadcast_to(n, total.shape), jnp.broadcast_to(m, total.shape)
    compat.store(out_ref, (share, m, n), total, (m < count) & (n < weight.features) & (r < settings.tiles))


def supported(weight: Weight, settings: Settings, count: int) -> None:
    """Raise NotImplementedError for what the kernel cannot do."""
    if not 0 < count <= MOST:
        raise NotImplementedError(f"the mma kernel takes up to {MOST} rows of x, not {count}")
    if weight.bits != 4 and weight.layout not in CONTRACTS:
        raise NotImplementedError(f"{weight.bits} bits come in tiles alone, not in layout {weight.layout!r}")
    if weight.layout == "first":
        if weight.group % 8 or weight.features % 4:
            raise NotImplementedError("columns come in fours and groups in eights")
    elif weight.group != 128:
        raise NotImplementedError(f"a warp reads rows in 128s, not in groups of {weight.group}")
    for number in (settings.along_k, settings.along_n):
        if number & (number - 1):
            raise NotImplementedError("warps are a power of two")


def product(
    x: Float[Array, "count width"],
    data: Int[Array, "..."],
    scale: Float[Array, "..."],
    *,
    weight: Weight,
    settings: Settings,
    after: Array | None = None,
    accumulate: Callable[..., list[Float[Array, "threads 4"]]] = accumulate,
) -> Float[Array, "split count features"]:
    """x [1..16, groups * group] bf16 times the weight: [1, count, features] bf16, or [split, ...] float32 parts.

    `after` is an array that the call waits for and does not read: what a benchmark chains calls with. Raises
    NotImplementedError for what the kernel cannot do.
    """
    supported(weight, settings, x.shape[0])
    span = 32 if weight.layout == "first" else 16
    dtype = jnp.float32 if settings.split > 1 else jnp.bfloat16
    laid_out = fragments(x, weight) if settings.ordered else x
    refs = (laid_out, data, scale) + (() if after is None else (after,))
    call: Callable[..., Array] = compat.call(
        functools.partial(_kernel, weight=weight, settings=settings, accumulate=accumulate),
        name=f"dequant_mma_{weight.layout}" + ("" if weight.bits == 4 else f"_{weight.bits}"),
        grid=(pl.cdiv(weight.features, span * settings.tiles * settings.along_n), settings.split),
        out_shape=jax.ShapeDtypeStruct((settings.split, x.shape[0], weight.features), dtype),
        warps=settings.along_k * settings.along_n,
    )
    return call(*refs)
