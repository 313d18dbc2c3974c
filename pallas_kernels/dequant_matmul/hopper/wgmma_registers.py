"""What a thread of wgmma.py does with its registers: reads words and scales, unpacks, exchanges, stores a sum.

Each function makes one that a Pallas kernel calls; inside it MLIR is written by hand, since which registers a thread
holds is what it is about.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels.compat import arith, ir, llvm, vector
from uniql_jax.pallas_kernels.compat import mosaic_gpu as plgpu
from uniql_jax.pallas_kernels.dequant_matmul.hopper.common import BLOCK, factors, weights
from uniql_jax.pallas_kernels.dequant_matmul.hopper.ptx import (
    add,
    array,
    asm,
    bits,
    do,
    part,
    place,
    thread,
    times,
    together,
    value,
)

HALF = 64
"""Contracted weights of one batch of wgmma: half a group, and one 128-byte line of x."""
CHUNK = {2: 64, 4: 32}
"""Bytes of an output element -> rows of y that are written at once: 8 KiB a warpgroup."""

ODD = ((4, 28), (28, 4), (0x0F0F0F0F, 0xF0F0F0F0))
"""What `_exchanged` needs, for an even and an odd thread of a row: rotations there and back, and the bits kept."""
UPPER = ((0x7531, 0x6420), (0x5240, 0x3514), (0x7260, 0x3716))
"""And for the lower and the upper two: bytes to send, and those of the first and of the second word from both."""


def _exchanged(first: Any, second: Any, odd: Sequence[Any], upper: Sequence[Any]) -> tuple[Any, Any]:
    """Pair t of each of four words, for thread t of a row, from the four pairs of its own: a 4 x 4 transpose, twice.

    Neighbours swap pairs, then pairs of neighbours swap pairs of pairs: half of each of two words at a time.
    """

    def swapped(word: Any, lane: int) -> Any:
        return asm(f"shfl.sync.bfly.b32 $0, $1, {lane}, 0x1f, 0xffffffff;", word, effects=True)

    def rotated(word: Any, by: Any) -> Any:
        return asm("shf.l.wrap.b32 $0, $1, $1, $2;", word, by)

    def chosen(kept: Any, other: Any) -> Any:
        return asm("lop3.b32 $0, $1, $2, $3, 0xCA;", keep, kept, other)

    def bytes_of(a: Any, b: Any, select: Any) -> Any:
        return asm("prmt.b32 $0, $1, $2, $3;", a, b, select)

    there, back, keep = odd
    other = swapped(chosen(rotated(second, back), first), 1)
    first, second = chosen(first, rotated(other, there)), chosen(second, other)
    send, of_first, of_second = upper
    other = swapped(bytes_of(first, second, send), 2)
    return bytes_of(first, other, of_first), bytes_of(second, other, of_second)


def words_of(tall: int, exchange: bool) -> Callable[[Any], tuple[Int[Array, "rows 8"], Int[Array, "rows 8"]]]:
    """A group's words in shared memory -> those of each half, in registers: words 2h and 2h + 1 of rows r and r + 8.

    They are held as arrays of wgmma's layout, though no element is where the layout says.
    """
    kind = plgpu.ShapeDtypeStruct((BLOCK * tall, 8), jnp.int32, plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=(kind, kind))
    def load(_: Any, ref: Any) -> Any:
        four = ir.VectorType.get((4,), ir.IntegerType.get_signless(32))
        lane, warp = thread()

        def where(bit: int, of: Sequence[tuple[int, int]]) -> list[Any]:
            """The second of each two for threads whose number has the bit."""
            which = arith.cmpi(arith.CmpIPredicate.ne, bits(lane, bit), value(0))
            return [arith.select(which, value(high), value(low)) for low, high in of]

        odd, upper = where(1, ODD), where(2, UPPER)
        halves: tuple[list[Any], list[Any]] = ([], [])
        for block in range(tall):
            tile = times(add(warp, 4 * block), 64)
            held = [llvm.load(four, place(ref, add(tile, 32 * late, lane), four), alignment=16) for late in (0, 1)]
            for half in (0, 1):
                for late in (0, 1):
                    first, second = (part(held[late], 2 * half + i) for i in (0, 1))
                    if exchange:
                        first, second = _exchanged(first, second, odd, upper)
                    halves[half].append(together(first, second))
        return tuple(array(half, kind) for half in halves)

    return load


def factors_of(tall: int) -> Callable[[Int[Array, " rows"]], tuple[Int[Array, " rows"], ...]]:
    """A group's scales -> what `weights_of` makes of them weights with."""
    kind = plgpu.ShapeDtypeStruct((BLOCK * tall,), jnp.int32, plgpu.Layout.WGMMA.reduce(1))

    @plgpu.inline_mgpu(arg_types=(kind.layout,), return_type=(kind,) * 3)
    def spread(_: Any, scales: Any) -> Any:
        of_rows = [factors(part(held, 0)) for held in scales.registers.reshape(-1)]
        return tuple(array([together(of_row[i]) for of_row in of_rows], kind) for i in range(3))

    return spread


def weights_of(tall: int) -> Callable[..., Float[Array, "rows 64"]]:
    """Half a group's words and its three factors -> weights * 2**-LIFT in bf16, as the A of four k16 steps."""
    kind = plgpu.ShapeDtypeStruct((BLOCK * tall, HALF), jnp.bfloat16, plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, *[plgpu.Layout.WGMMA.reduce(1)] * 3), return_type=kind)
    def unpack(_: Any, words: Any, *of: Any) -> Any:
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        held, of_rows = words.registers.reshape(-1, 2), [each.registers.reshape(-1, 2) for each in of]
        registers: list[Any] = []
        for block, i in itertools.product(range(tall), (0, 1)):
            pairs = [
                weights(part(held[block, late], i), tuple(part(each[block, late], 0) for each in of_rows))
                for late in (0, 1)
            ]
            for j, late in itertools.product(range(4), (0, 1)):
                registers.append(vector.bitcast(pair, together(pairs[late][j])))
        return array(registers, kind)

    return unpack


def transposed(tile_m: int, block: int, start: int, size: int) -> Callable[[Any, Any], None]:
    """Store 64 rows of the sum, a chunk of its columns, transposed, in `size` bytes each: [lines, chunk, 128 bytes].

    The 16-byte pieces of a line are permuted as TMA does it, which spreads them over the banks.
    """
    chunk = CHUNK[size]
    columns = range(chunk // 8)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType((plgpu.SwizzleTransform(128),)), plgpu.Layout.WGMMA))
    def store(_: Any, ref: Any, total: Any) -> None:
        lane, warp = thread()
        held = total.registers.reshape(-1, tile_m // 8, 2)

        def sums(column: int, late: int) -> list[Any]:
            """Two neighbouring columns of a row."""
            return [part(held[block, start // 8 + column, late], e) for e in (0, 1)]

        if size == 2:
            # Four 8 x 8 matrices at once: lane l gives the line of column l % 8 of matrix l / 8.
            line = bits(lane, 7)
            piece = arith.xori(add(times(warp, 2), bits(lane, 1, 3)), line)
            first = add(times(piece, 16), times(add(line, times(bits(lane, 1, 4), 8)), 128))
            for column in columns[::2]:
                matrices = itertools.product((column, column + 1), (0, 1))
                pairs = [asm("cvt.rn.bf16x2.f32 $0, $2, $1;", *sums(*matrix)) for matrix in matrices]
                address = place(ref, add(first, column * 8 * 128), ir.IntegerType.get_signless(8))
                do("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};", address, *pairs)
            return
        # Two lines of 32 rows of the weight, 16 from each warp. No two lanes of a store share a bank.
        for late, e in itertools.product((0, 1), (0, 1)):
            n = add(times(bits(warp, 1), 16), bits(lane, 7, 2), 8 * late)
            line = add(times(bits(lane, 3), 2), e)
            piece = arith.xori(bits(n, 7, 2), line)
            first = add(times(piece, 4), bits(n, 3), times(line, 32), times(bits(warp, 1, 1), 32 * chunk))
            for column in columns:
                address = place(ref, add(first, column * 8 * 32), ir.F32Type.get())
                llvm.store(sums(column, late)[e], address, alignment=4)

    return store
