"""What a thread of wgmma.py does with its registers: reads words and scales, unpacks, exchanges, stores a sum.

Each function makes one that a Pallas kernel calls; inside it MLIR is written by hand, since which registers a thread
holds is what it is about.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.compat import arith, ir, llvm, vector
from pallas_kernels.compat import mosaic as mgpu
from pallas_kernels.compat import mosaic_gpu as plgpu
from pallas_kernels.dequant_matmul.tiling import Weight

HALF = 64
"""Contracted weights of one batch of wgmma: half a group, and one 128-byte line of x."""
BLOCK = 64
"""Rows of a wgmma."""
CHUNK = {2: 64, 4: 32}
"""Bytes of an output element -> rows of y that are written at once, where there are so many: 8 KiB a warpgroup."""
LEAST = {2: 16, 4: 8}
"""Bytes of an output element -> rows of y that a store of all threads writes."""


def _value(number: Any) -> Any:
    """A 32-bit constant, unless it is a value already."""
    if not isinstance(number, int):
        return number
    kind = ir.IntegerType.get_signless(32)
    return arith.constant(kind, ir.IntegerAttr.get(kind, number - 2**32 if number >= 2**31 else number))


def _add(*terms: Any) -> Any:
    return functools.reduce(arith.addi, map(_value, terms))


def _times(a: Any, b: Any) -> Any:
    return arith.muli(_value(a), _value(b))


def _bits(a: Any, mask: int, shift: int = 0) -> Any:
    """(a >> shift) & mask."""
    return arith.andi(arith.shrui(a, _value(shift)) if shift else a, _value(mask))


def _asm(text: str, *operands: Any, effects: bool = False) -> Any:
    """One line of PTX and the 32 bits that it yields; a float32 among its operands is an "f", an address an "l"."""
    operands = tuple(map(_value, operands))
    kinds = [
        "f" if isinstance(o.type, ir.F32Type) else "r" if isinstance(o.type, ir.IntegerType) else "l" for o in operands
    ]
    constraints = ",".join(["=r", *kinds])
    kind = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(kind, list(operands), text, constraints, has_side_effects=effects, asm_dialect=0)


def _thread() -> tuple[Any, Any]:
    """Of a thread: its lane, and its warp within the warpgroup."""
    index = mgpu.utils.thread_idx()
    return _bits(index, 31), _bits(index, 3, 5)


def _place(ref: Any, index: Any, kind: Any) -> Any:
    """Where element `index`, counted in `kind`, of a contiguous ref lies."""
    return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [index], kind)


def _part(held: Any, position: int) -> Any:
    """An element of a register that holds several."""
    return vector.extract(held, dynamic_position=[], static_position=[position])


def _together(*parts: Any) -> Any:
    """One register from its elements."""
    return vector.from_elements(ir.VectorType.get((len(parts),), parts[0].type), list(parts))


def _array(registers: Sequence[Any], kind: Any) -> Any:
    """Registers in the order of the layout: wgmma's has [64 rows][8 columns][rows 0-7 or 8-15 of a warp]."""
    layout = kind.layout.to_mgpu()
    held = np.empty(len(registers), object)
    held[:] = registers
    signed = True if jnp.issubdtype(kind.dtype, jnp.integer) else None
    return mgpu.FragmentedArray(
        _registers=held.reshape(layout.registers_shape(kind.shape)), _layout=layout, _is_signed=signed
    )


SHIFT, KEEP, SELECT = (4, 28), (0x0F0F0F0F, 0xF0F0F0F0), (0x6240, 0x3715)
"""Of an even and an odd thread, and of the lower and the upper two: how `_exchanged` rotates, keeps and selects."""


def _exchanged(word: Any, shift: Any, keep: Any, select: Any) -> Any:
    """Pair t of each of four words, for thread t of a row, from the four pairs of its own: a 4 x 4 transpose.

    Neighbours swap pairs, then pairs of neighbours swap pairs of pairs.
    """
    other = _asm("shfl.sync.bfly.b32 $0, $1, 1, 0x1f, 0xffffffff;", word, effects=True)
    other = _asm("shf.l.wrap.b32 $0, $1, $1, $2;", other, shift)
    word = _asm("lop3.b32 $0, $1, $2, $3, 0xCA;", keep, word, other)
    other = _asm("shfl.sync.bfly.b32 $0, $1, 2, 0x1f, 0xffffffff;", word, effects=True)
    return _asm("prmt.b32 $0, $1, $2, $3;", word, other, select)


def words_of(tall: int, exchange: bool) -> Callable[[Any], tuple[Int[Array, "rows 8"], Int[Array, "rows 8"]]]:
    """A group's words in shared memory -> those of each half, in registers: words 2h and 2h + 1 of rows r and r + 8.

    They are held as arrays of wgmma's layout, though no element is where the layout says.
    """
    kind = plgpu.ShapeDtypeStruct((BLOCK * tall, 8), jnp.int32, plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=(kind, kind))
    def load(_: Any, ref: Any) -> Any:
        four = ir.VectorType.get((4,), ir.IntegerType.get_signless(32))
        lane, warp = _thread()
        odd, upper = (arith.cmpi(arith.CmpIPredicate.ne, _bits(lane, mask), _value(0)) for mask in (1, 2))
        of_thread = [
            arith.select(which, _value(high), _value(low))
            for which, (low, high) in ((odd, SHIFT), (odd, KEEP), (upper, SELECT))
        ]
        halves: tuple[list[Any], list[Any]] = ([], [])
        for block in range(tall):
            tile = _times(_add(warp, 4 * block), 64)
            held = [llvm.load(four, _place(ref, _add(tile, 32 * late, lane), four), alignment=16) for late in (0, 1)]
            for half in (0, 1):
                for late in (0, 1):
                    pair = [_part(held[late], 2 * half + i) for i in (0, 1)]
                    halves[half].append(_together(*(_exchanged(w, *of_thread) if exchange else w for w in pair)))
        return tuple(_array(half, kind) for half in halves)

    return load


def scales_of(tall: int, weight: Weight) -> Callable[[Any, Any, Any], Int[Array, " rows"]]:
    """The scales of a group (16 bits each) for rows r and r + 8 of each warp, straight from memory."""
    kind = plgpu.ShapeDtypeStruct((BLOCK * tall,), jnp.int32, plgpu.Layout.WGMMA.reduce(1))
    scalar = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), scalar, scalar), return_type=kind)
    def load(_: Any, ref: Any, row: Any, group: Any) -> Any:
        lane, warp = _thread()
        first, group = _add(row.registers.item(), _times(warp, 16), _bits(lane, 7, 2)), group.registers.item()
        held = []
        for late in range(0, BLOCK * tall, 8):
            if late % BLOCK > 8:
                continue
            n = arith.minui(_add(first, late), _value(weight.features - 1))  # what lies beyond is not stored
            if weight.order == "rows":
                at = _add(_times(n, weight.groups), group)
            else:
                at = _add(_times(group, weight.features), n)
            # With an effect, so that it is issued here, long before its use.
            place = _place(ref, at, ir.IntegerType.get_signless(16))
            held.append(_together(_asm("ld.global.nc.u16 $0, [$1];", place, effects=True)))
        return _array(held, kind)

    return load


def weights_of(tall: int) -> Callable[[Int[Array, "rows 8"], Int[Array, " rows"]], Float[Array, "rows 64"]]:
    """Half a group's words and their scales -> (q - 8) * scale in bf16, rounded once, as the A of four k16 steps."""
    kind = plgpu.ShapeDtypeStruct((BLOCK * tall, HALF), jnp.bfloat16, plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)), return_type=kind)
    def unpack(_: Any, words: Any, scales: Any) -> Any:
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        held, factors = words.registers.reshape(-1, 2), scales.registers.reshape(-1, 2)
        registers: list[Any] = []
        for block in range(tall):
            spread = [_asm("prmt.b32 $0, $1, $1, 0x1010;", _part(factors[block, late], 0)) for late in (0, 1)]
            for i, j, late in itertools.product((0, 1), range(4), (0, 1)):
                word = _part(held[block, late], i)
                # bf16 has eight bits of mantissa: 128 + q is an `or` with the exponent of 128.
                word = arith.shrui(word, _value(4 * j)) if j else word
                raw = _asm("lop3.b32 $0, $1, $2, $3, 0xEA;", word, 0x000F000F, 0x43004300)
                number = _asm("fma.rn.bf16x2 $0, $1, $2, $3;", raw, 0x3F803F80, 0xC308C308)
                scaled = _asm("fma.rn.bf16x2 $0, $1, $2, $3;", number, spread[late], 0x80008000)
                registers.append(vector.bitcast(pair, _together(scaled)))
        return _array(registers, kind)

    return unpack


def transposed(tile_m: int, block: int, start: int, size: int) -> Callable[[Any, Any], None]:
    """Store 64 rows of the sum, a chunk of its columns, transposed, in `size` bytes each: [lines, chunk, 128 bytes].

    The 16-byte pieces of a line are permuted as TMA does it, which spreads them over the banks.
    """
    chunk = min(CHUNK[size], tile_m)
    columns = range(chunk // 8)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType((plgpu.SwizzleTransform(128),)), plgpu.Layout.WGMMA))
    def store(_: Any, ref: Any, total: Any) -> None:
        lane, warp = _thread()
        held = total.registers.reshape(-1, tile_m // 8, 2)

        def sums(column: int, late: int) -> list[Any]:
            """Two neighbouring columns of a row."""
            return [_part(held[block, start // 8 + column, late], e) for e in (0, 1)]

        if size == 2:
            # Four 8 x 8 matrices at once: lane l gives the line of column l % 8 of matrix l / 8.
            line = _bits(lane, 7)
            piece = arith.xori(_add(_times(warp, 2), _bits(lane, 1, 3)), line)
            first = _add(_times(piece, 16), _times(_add(line, _times(_bits(lane, 1, 4), 8)), 128))
            for column in columns[::2]:
                matrices = itertools.product((column, column + 1), (0, 1))
                pairs = [_asm("cvt.rn.bf16x2.f32 $0, $2, $1;", *sums(*matrix)) for matrix in matrices]
                llvm.inline_asm(
                    None,
                    [_place(ref, _add(first, column * 8 * 128), ir.IntegerType.get_signless(8)), *pairs],
                    "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};",
                    "r,r,r,r,r,~{memory}",
                    has_side_effects=True,
                    asm_dialect=0,
                )
            return
        # Two lines of 32 rows of the weight, 16 from each warp. No two lanes of a store share a bank.
        for late, e in itertools.product((0, 1), (0, 1)):
            n = _add(_times(_bits(warp, 1), 16), _bits(lane, 7, 2), 8 * late)
            line = _add(_times(_bits(lane, 3), 2), e)
            piece = arith.xori(_bits(n, 7, 2), line)
            first = _add(_times(piece, 4), _bits(n, 3), _times(line, 32), _times(_bits(warp, 1, 1), 32 * chunk))
            for column in columns:
                place = _place(ref, _add(first, column * 8 * 32), ir.F32Type.get())
                llvm.store(sums(column, late)[e], place, alignment=4)

    return store
