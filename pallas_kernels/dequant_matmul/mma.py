"""Up to 16 rows of x times a 4-bit weight: words become bf16 pairs in registers and feed mma.sync as they are.

A tensor of shape [32 * warps, 4] gives thread i its row of four elements: one 16-byte load, and exactly what a fragment
of mma m16n8k16 wants when the weight is its A (rows) and x its B (columns). No shared memory, no shuffle, until the
warps that share the contraction add up once at the end. Contracted weights may be visited in any order so long as x is
visited in the same, so each layout takes the order in which its loads are widest.

That thread i holds row i is how Triton lays out such a tensor, not a promise: `selfcheck.py` verifies it on the device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import compat
from pallas_kernels.compat import pl
from pallas_kernels.dequant_matmul.tiling import Weight

MOST = 16
"""Rows of x: two column tiles of the mma."""
STEP = 32
"""Contracted weights that the four lanes of a row hold in one word each: two mma."""


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
    ahead: bool = False
    """Words of the next batch are loaded before this one is computed."""
    ordered: bool = False
    """x is first laid out as its fragments, by a kernel of XLA's: a warp then reads it in whole lines."""
    stream: bool = False
    """Words leave the first-level cache before x and the scales do."""


# --- the three steps that are not plain jnp -------------------------------------------------------------------------


def _asm(text: str, constraints: str, args: Sequence[Array], dtype: Any, pack: int) -> Array:
    shape = jax.ShapeDtypeStruct(args[0].shape, dtype)
    [out] = compat.triton().elementwise_inline_asm(
        text, args=list(args), constraints=constraints, pack=pack, result_shape_dtypes=[shape]
    )
    return out


def _pair(word: Int[Array, "threads 4"], j: int, centred: bool, mask: Array | None) -> Int[Array, "threads 4"]:
    """Weights 2j and 2j + 1 of each word as two bf16: 128 + q, which is an `or`, or exactly q - 8."""
    if compat.interpreted():
        raw = ((word >> (4 * j)) & 0x000F000F) | 0x43004300
        return _join(*(half - 136.0 for half in _halves(raw))) if centred else raw
    # and-or is one lop3 here; as jnp operations it becomes two.
    lines = ["{ .reg .b32 w, m, e;", "mov.b32 e, 0x43004300;", f"shr.u32 w, $1, {4 * j};"]
    lines += ["mov.b32 m, 0x000F000F;" if mask is None else "mov.b32 m, $2;", "lop3.b32 w, w, m, e, 0xEA;"]
    if centred:
        lines += ["mov.b32 m, 0x3F803F80;", "mov.b32 e, 0xC308C308;", "fma.rn.bf16x2 w, w, m, e;"]
    args = [word] if mask is None else [word, mask]
    return _asm(" ".join([*lines, "mov.b32 $0, w; }"]), ",".join(["=r", *"rr"[: len(args)]]), args, jnp.int32, 1)


def _gate(index: Array, threads: int) -> Array | None:
    """0x000F000F, which no compiler can know before the barrier that yields it: loads above it stay above."""
    if compat.interpreted():
        return None
    lines = ["{ .reg .pred p;", "setp.ne.s32 p, $4, -1;", "bar.red.or.pred p, 0, p;"]
    lines += [f"selp.b32 ${i}, 0x000F000F, 0, p;" for i in range(4)]
    arg = jnp.broadcast_to(index, (threads, 4))
    return _asm(" ".join([*lines, "}"]), "=r,=r,=r,=r,r,r,r,r", [arg], jnp.int32, 4)


def _halves(pairs: Int[Array, "..."]) -> tuple[Array, Array]:
    """Low and high bf16 of each 32-bit element, as float32."""
    as_float = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.float32)
    return as_float(pairs << 16), as_float(pairs & jnp.int32(-65536))


def _join(low: Float[Array, "..."], high: Float[Array, "..."]) -> Int[Array, "..."]:
    """Inverse of `_halves` for numbers that bf16 holds exactly."""
    bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.int32)
    return jax.lax.shift_right_logical(bits(low), 16) | (bits(high) & jnp.int32(-65536))


Operand = tuple[Array, int]
"""A [threads, 4] tensor and the register of each thread's part of it: an element of 32 bits, or two of 16."""


def _mma(steps: Sequence[tuple[Sequence[Operand], Operand]], total: Array) -> Array:
    """Total [threads, 4] float32 plus A B for each step: four A registers and the first of two B registers."""
    if compat.interpreted():
        for registers, b in steps:
            total = total + _mma_interpreted([tensor[:, i] for tensor, i in registers], b)
        return total
    tensors: dict[int, Array] = {}
    for registers, b in steps:
        tensors |= {id(tensor): tensor for tensor, _ in (*registers, b)}
    place, free = {}, 8  # $0..$3 are the sum, tied to its value before: $4..$7
    for key, tensor in tensors.items():
        place[key] = free
        free += tensor.dtype.itemsize
    lines = []
    for registers, (b, at) in steps:
        a = ", ".join(f"${place[id(tensor)] + i}" for tensor, i in registers)
        at += place[id(b)]
        lines.append(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, "
            f"{{{a}}}, {{${at}, ${at + 1}}}, {{$0, $1, $2, $3}};"
        )
    constraints = ",".join(["=f"] * 4 + ["0", "1", "2", "3"] + ["r"] * (free - 8))
    return _asm("\n".join(lines), constraints, [total, *tensors.values()], jnp.float32, 4)


def _mma_interpreted(registers: Sequence[Int[Array, " threads"]], b: Operand) -> Float[Array, "threads 4"]:
    """What the instruction does, lane by lane, for the interpreter."""
    tensor, at = b
    warps = tensor.shape[0] // 32
    if tensor.dtype == jnp.int32:
        tensor = jnp.stack(_halves(tensor[:, at : at + 2]), axis=-1)
    pieces = []
    for register in registers:
        pieces.append(jnp.stack(_halves(register), axis=-1).reshape(warps, 8, 8))  # [warp, row, 2 t + half]
    upper, lower = (jnp.concatenate([pieces[i], pieces[i + 2]], axis=2) for i in (0, 1))
    a = jnp.concatenate([upper, lower], axis=1)  # [warp, 16 rows, 16 k]
    column = tensor.astype(jnp.float32).reshape(warps, 8, 4, 2, 2)  # [warp, column, t, register, half]
    column = column.transpose(0, 1, 3, 2, 4).reshape(warps, 8, 16)
    d = jnp.einsum("wrk,wck->wrc", a, column, precision="highest").reshape(warps, 2, 8, 4, 2)
    return d.transpose(0, 2, 3, 1, 4).reshape(32 * warps, 4)


# --- the kernel -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Threads:
    """Where each thread of a program stands: int32 [threads, 1] each; `element` is [1, 4]."""

    warp_n: Array
    warp_k: Array
    row: Array
    lane: Array
    element: Array

    @classmethod
    def make(cls, warps_k: int, warps_n: int) -> Threads:
        """Row and lane are a fragment's: thread % 32 = 4 * row + lane."""
        thread = jax.lax.broadcasted_iota(jnp.int32, (32 * warps_k * warps_n, 1), 0)
        warp, within = thread // 32, thread % 32
        element = jax.lax.broadcasted_iota(jnp.int32, (1, 4), 1)
        return cls(warp % warps_n, warp // warps_n, within // 4, within % 4, element)


def _words(data_ref: Any, weight: Weight, at: Threads, tile: Array, group: Array, settings: Settings) -> list[Array]:
    """The words of one group that a thread feeds, [threads, 4] each.

    Not "first": two tensors, rows `row` and `row` + 8 of the tile, whose elements are words. "first": one tensor per
    word, whose elements are four neighbouring columns.
    """
    if weight.order in ("rows", "groups"):
        major = (tile, group) if weight.order == "rows" else (group, tile)
        places = [(*major, j, 4 * at.row + at.lane, at.element) for j in (0, 1)]
        return [compat.stream(data_ref, place) if settings.stream else data_ref[place] for place in places]
    if weight.order == "last":
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


def _x(x_ref: Any, weight: Weight, at: Threads, group: Array, column: int) -> list[list[Operand]]:
    """x for one column tile: [word of the thread][half of the word], the first of two registers each.

    One 16-byte load a word where x comes as int32 pairs, two of 8 bytes where it is bf16.
    """
    if x_ref.ndim == 5:  # as `fragments` lays it out
        held = [x_ref[group, column, i, 4 * at.row + at.lane, at.element] for i in range(x_ref.shape[2])]
        return [[(piece, 0), (piece, 2)] for piece in held]
    m = jnp.minimum(at.row + 8 * column, x_ref.shape[0] - 1)
    words, wide = weight.group // 8, x_ref.dtype == jnp.int32
    loaded: list[list[Operand]] = []
    for i in range(-(-words // 4)):
        word = 4 * at.lane + i if weight.order == "last" else 4 * i + at.lane
        first = (group * words + word) * (4 if wide else 8) + at.element
        pieces = []
        for start in (0,) if wide else (0, 4):
            if weight.order == "first" and 4 * i + 4 > words:
                mask = jnp.broadcast_to(word < words, (at.row.shape[0], 4))
                pieces.append(compat.load(x_ref, (m, first + start), mask))
            else:
                pieces.append(x_ref[m, first + start])
        loaded.append([(pieces[0], 0), (pieces[0], 2)] if wide else [(piece, 0) for piece in pieces])
    return loaded


def _steps(weight: Weight, pairs: list[list[Array]], x: list[list[Operand]], part: int) -> list[tuple[Any, Operand]]:
    """The mma of one 16-row tile over one group: fragments of A from `pairs`, and their x."""
    steps = []
    for i, halves in enumerate(x):
        for half, b in enumerate(halves):
            if weight.order == "first":
                even, odd = pairs[i][2 * half], pairs[i][2 * half + 1]
                steps.append((((even, 2 * part), (even, 2 * part + 1), (odd, 2 * part), (odd, 2 * part + 1)), b))
            else:
                steps.append((tuple((pairs[row][2 * half + late], i) for late in (0, 1) for row in (0, 1)), b))
    return steps


def _scales(scale_ref: Any, weight: Weight, at: Threads, tile: Array, group: Array) -> list[Array]:
    """The scale of each element of the accumulator, float32 [threads, 4], for each 16-row part of a tile."""
    if weight.order == "first":
        rows = [32 * tile + 4 * at.row + j for j in range(4)]
    else:
        rows = [16 * tile + at.row, 16 * tile + at.row + 8]
    of_row = []
    if scale_ref.ndim == 3:  # [row tile, group, row]: the 16 of a tile side by side
        rows, of_row = [], [scale_ref[tile, group, at.row + late].astype(jnp.float32) for late in (0, 8)]
    for n in rows:
        n = jnp.minimum(n, weight.features - 1)
        index = (group, n) if weight.order in ("first", "groups") else (n, group)
        of_row.append(scale_ref[index].astype(jnp.float32))
    upper = at.element < 2
    return [jnp.where(upper, of_row[i], of_row[i + 1]) for i in range(0, len(of_row), 2)]


def _kernel(*refs: Any, weight: Weight, settings: Settings) -> None:
    """refs: x [count, K] or its fragments, data, scale, (what the call waits for,) out [split, count, features]."""
    x_ref, data_ref, scale_ref, out_ref = *refs[:3], refs[-1]
    count, parts = out_ref.shape[1], 2 if weight.order == "first" else 1
    columns = 1 if count <= 8 else 2
    block, share = pl.program_id(0), pl.program_id(1)
    at = Threads.make(settings.along_k, settings.along_n)
    threads = at.row.shape[0]
    span = 16 * parts
    first_tile = (block * settings.along_n + at.warp_n) * settings.tiles
    tiles = [jnp.minimum(first_tile + r, pl.cdiv(weight.features, span) - 1) for r in range(settings.tiles)]
    stride = settings.along_k * settings.batch
    ragged = weight.groups % (stride * settings.split) != 0
    zeros = jnp.zeros((threads, 4), jnp.float32)

    def groups_of(index: Array) -> list[tuple[Array, Array]]:
        """The groups of a batch, and whether each exists; a batch past the end repeats the last."""
        start = (index * settings.split + share) * stride + at.warp_k
        groups = [start + u * settings.along_k for u in range(settings.batch)]
        return [
            (jnp.minimum(g, weight.groups - 1) if ragged or settings.ahead else g, g < weight.groups) for g in groups
        ]

    def words_of(index: Array) -> list[list[list[Array]]]:
        return [
            [_words(data_ref, weight, at, tile, group, settings) for tile in tiles] for group, _ in groups_of(index)
        ]

    def compute(index: Array, words: list[list[list[Array]]], sums: Sequence[Array]) -> list[Array]:
        groups, sums = groups_of(index), list(sums)
        scales = [[_scales(scale_ref, weight, at, tile, group) for tile in tiles] for group, _ in groups]
        xs = [[_x(x_ref, weight, at, group, column) for column in range(columns)] for group, _ in groups]
        mask = _gate(index, threads) if settings.gate else None
        for u, (_, inside) in enumerate(groups):
            base = [_zero_point(x, zeros) if settings.zero == "mma" else zeros for x in xs[u]]
            slot = 0
            for r in range(settings.tiles):
                pairs = [[_pair(word, j, settings.zero == "fma", mask) for j in range(4)] for word in words[u][r]]
                for part in range(parts):
                    for column in range(columns):
                        product = _mma(_steps(weight, pairs, xs[u][column], part), base[column])
                        if ragged:  # a repeated group must add nothing, not even 0 * inf
                            product = jnp.where(inside, product, 0.0)
                        sums[slot] = sums[slot] + product * scales[u][r][part]
                        slot += 1
        return sums

    def step(index: Array, carry: Any) -> Any:
        words, sums = carry
        if not settings.ahead:
            return (), compute(index, words_of(index), sums)
        return words_of(index + 1), compute(index, words, sums)

    rounds = pl.cdiv(weight.groups, stride * settings.split)
    first = words_of(jnp.int32(0)) if settings.ahead else ()
    _, totals = jax.lax.fori_loop(0, rounds, step, (first, [zeros] * (settings.tiles * parts * columns)))
    _write(out_ref, weight, settings, totals, block, share, count)


def _write(
    out_ref: Any, weight: Weight, settings: Settings, totals: Sequence[Array], block: Array, share: Array, count: int
) -> None:
    """Add up the warps that share a contraction, in one pass over all accumulators, and store."""
    # Joined along new last axes, [threads, 4, 2, 2, ...]: bit b of an accumulator's number is axis 2 + b.
    level = list(totals)
    while len(level) > 1:
        half = len(level) // 2
        level = [jnp.stack([level[i], level[half + i]], axis=-1) for i in range(half)]
    bits = len(totals).bit_length() - 1
    total = level[0]
    if settings.along_k > 1:
        total = total.reshape(settings.along_k, -1, *total.shape[1:]).sum(0)
    at = Threads.make(1, settings.along_n)
    slot = sum(
        (jax.lax.broadcasted_iota(jnp.int32, (1,) * (2 + axis) + (2,) + (1,) * (bits - 1 - axis), 2 + axis) << bit)
        for axis, bit in enumerate(reversed(range(bits)))
    )
    outer = (..., *(None,) * bits)
    columns = 1 if count <= 8 else 2
    parts = 2 if weight.order == "first" else 1
    column, part, r = slot % columns, slot // columns % parts, slot // (columns * parts)
    late, odd = (at.element // 2)[outer], (at.element % 2)[outer]
    row, lane, warp = at.row[outer], at.lane[outer], at.warp_n[outer]
    within = 4 * row + 2 * part + late if parts == 2 else row + 8 * late
    n = 16 * parts * ((block * settings.along_n + warp) * settings.tiles + r) + within
    m = 8 * column + 2 * lane + odd
    n, m = jnp.broadcast_to(n, total.shape), jnp.broadcast_to(m, total.shape)
    compat.store(out_ref, (share, m, n), total, (m < count) & (n < weight.features))


def _zero_point(x: list[list[Operand]], zeros: Array) -> Array:
    """-136 times the sum of x over the group, in every row: an mma whose A is constant."""
    constant = jnp.full(zeros.shape, -1022835960, jnp.int32)  # 0xC308C308, two bf16 -136
    return _mma([(((constant, 0),) * 4, b) for halves in x for b in halves], zeros)


def fragments(x: Float[Array, "count width"], weight: Weight) -> Int[Array, "groups columns words 32 4"]:
    """x bf16 as the threads of a warp want it: int32 pairs [group, column tile, word, thread, pair of the word]."""
    words = weight.group // 8
    columns, steps = -(-x.shape[0] // 8), -(-words // 4)
    x = jnp.pad(x, ((0, 8 * columns - x.shape[0]), (0, 0))).reshape(columns, 8, weight.groups, words, 8)
    x = jnp.pad(x, ((0, 0),) * 3 + ((0, 4 * steps - words), (0, 0)))
    if weight.order == "last":  # [column tile, row, group, lane, step, ...]
        parts = x.reshape(columns, 8, weight.groups, 4, steps, 8).transpose(2, 0, 4, 1, 3, 5)
    else:
        parts = x.reshape(columns, 8, weight.groups, steps, 4, 8).transpose(2, 0, 3, 1, 4, 5)
    pairs = parts.reshape(weight.groups, columns, steps, 32, 4, 2)
    return jax.lax.bitcast_convert_type(pairs, jnp.int32)


def supported(weight: Weight, settings: Settings, count: int) -> None:
    """Raise NotImplementedError for what the kernel cannot do."""
    if not 0 < count <= MOST:
        raise NotImplementedError(f"the mma kernel takes up to {MOST} rows of x, not {count}")
    if weight.order == "first":
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
) -> Float[Array, "split count features"]:
    """x [1..16, groups * group] bf16 times the weight: [1, count, features] bf16, or [split, ...] float32 parts.

    The scales of order "rows" may also come as [row tiles, groups, 16]. `after` is an array that the call waits for
    and does not read: what a benchmark chains calls with. Raises NotImplementedError for what the kernel cannot do.
    """
    supported(weight, settings, x.shape[0])
    span = 32 if weight.order == "first" else 16
    dtype = jnp.float32 if settings.split > 1 else jnp.bfloat16
    laid_out = fragments(x, weight) if settings.ordered else x
    refs = (laid_out, data, scale) + (() if after is None else (after,))
    call: Callable[..., Array] = compat.call(
        functools.partial(_kernel, weight=weight, settings=settings),
        name=f"dequant_mma_{weight.order}",
        grid=(pl.cdiv(weight.features, span * settings.tiles * settings.along_n), settings.split),
        out_shape=jax.ShapeDtypeStruct((settings.split, x.shape[0], weight.features), dtype),
        warps=settings.along_k * settings.along_n,
    )
    return call(*refs)
