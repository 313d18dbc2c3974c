"""What kernels that hold their own registers are written in: MLIR values, lines of PTX, places in memory.

Used inside `inline_mgpu` of Pallas Mosaic GPU, where each thread of a warpgroup runs the same code.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from uniql_jax.pallas_kernels.compat import arith, ir, llvm, vector
from uniql_jax.pallas_kernels.compat import mosaic as mgpu


def value(number: Any) -> Any:
    """A 32-bit constant, unless it is a value already."""
    if not isinstance(number, int):
        return number
    kind = ir.IntegerType.get_signless(32)
    return arith.constant(kind, ir.IntegerAttr.get(kind, number - 2**32 if number >= 2**31 else number))


def add(*terms: Any) -> Any:
    """The sum of 32-bit values and numbers."""
    return functools.reduce(arith.addi, map(value, terms))


def times(a: Any, b: Any) -> Any:
    """The product of two 32-bit values or numbers."""
    return arith.muli(value(a), value(b))


def bits(a: Any, mask: int, shift: int = 0) -> Any:
    """(a >> shift) & mask."""
    return arith.andi(arith.shrui(a, value(shift)) if shift else a, value(mask))


def _constraint(operand: Any) -> str:
    """How PTX takes it: a float32 as "f", 32 bits (a place in shared memory, too) as "r", another address as "l"."""
    if isinstance(operand.type, ir.F32Type):
        return "f"
    shared = not isinstance(operand.type, ir.IntegerType) and "<3>" in str(operand.type)
    return "r" if shared or isinstance(operand.type, ir.IntegerType) else "l"


def asm(text: str, *operands: Any, effects: bool = False) -> Any:
    """One line of PTX and the 32 bits that it yields."""
    operands = tuple(map(value, operands))
    constraints = ",".join(["=r", *map(_constraint, operands)])
    kind = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(kind, list(operands), text, constraints, has_side_effects=effects, asm_dialect=0)


def fma(a: Any, b: Any, c: Any) -> Any:
    """a * b + c in float32, rounded once."""
    text, constraints = "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f"
    return llvm.inline_asm(ir.F32Type.get(), [a, b, c], text, constraints, has_side_effects=False, asm_dialect=0)


def do(text: str, *operands: Any) -> None:
    """Lines of PTX that yield nothing and that nothing else in memory may pass."""
    operands = tuple(map(value, operands))
    constraints = ",".join([*map(_constraint, operands), "~{memory}"])
    llvm.inline_asm(None, list(operands), text, constraints, has_side_effects=True, asm_dialect=0)


def when(condition: Any, text: str, *operands: Any, guarded: bool = False) -> None:
    """Lines of PTX ($1, $2, ... are the operands) for the threads whose `condition` is not 0.

    One instruction, or, if `guarded`, some that heed the predicate `p` where they must.
    """
    do("{ .reg .pred p; setp.ne.b32 p, $0, 0; " + ("" if guarded else "@p ") + text + " }", condition, *operands)


def _compared(predicate: Any, a: Any, b: Any) -> Any:
    return arith.extui(ir.IntegerType.get_signless(32), arith.cmpi(predicate, value(a), value(b)))


def equal(a: Any, b: Any) -> Any:
    """1 where a == b, else 0."""
    return _compared(arith.CmpIPredicate.eq, a, b)


def below(a: Any, b: Any) -> Any:
    """1 where a < b, else 0, of unsigned values."""
    return _compared(arith.CmpIPredicate.ult, a, b)


def both(*conditions: Any) -> Any:
    """1 where all of them are."""
    return functools.reduce(arith.andi, conditions)


def thread() -> tuple[Any, Any]:
    """Of a thread: its lane, and its warp within the warpgroup."""
    index = mgpu.utils.thread_idx()
    return bits(index, 31), bits(index, 3, 5)


def place(ref: Any, index: Any, kind: Any) -> Any:
    """Where element `index`, counted in `kind`, of a contiguous ref lies."""
    return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [index], kind)


def part(held: Any, position: int) -> Any:
    """An element of a register that holds several."""
    return vector.extract(held, dynamic_position=[], static_position=[position])


def together(*parts: Any) -> Any:
    """One register from its elements."""
    return vector.from_elements(ir.VectorType.get((len(parts),), parts[0].type), list(parts))


def array(registers: Sequence[Any], kind: Any) -> Any:
    """Registers in the order of the layout: wgmma's has [64 rows][8 columns][rows 0-7 or 8-15 of a warp]."""
    layout = kind.layout.to_mgpu()
    held = np.empty(len(registers), object)
    held[:] = registers
    signed = True if jnp.issubdtype(kind.dtype, jnp.integer) else None
    return mgpu.FragmentedArray(
        _registers=held.reshape(layout.registers_shape(kind.shape)), _layout=layout, _is_signed=signed
    )
