"""What a thread of cluster.py does itself: it unpacks words and multiplies.

Each function makes one that a Pallas kernel calls, as in wgmma_registers.py. A warp works on tiles of 16 weight rows
and columns of 8 rows of x, with mma m16n8k16; its sums lie as wgmma's do: 64 rows of the weight a block, 16 a warp.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from uniql_jax.pallas_kernels.compat import arith, ir, llvm
from uniql_jax.pallas_kernels.compat import mosaic_gpu as plgpu
from uniql_jax.pallas_kernels.dequant_matmul.hopper.common import BLOCK, UNSCALED, factors, weights
from uniql_jax.pallas_kernels.dequant_matmul.hopper.ptx import (
    add,
    array,
    fma,
    part,
    place,
    thread,
    times,
    together,
    value,
)


def lines() -> Any:
    """How x lies in shared memory: the rows of a column, 32 contracted weights of each, which is what a warp reads at
    once (the four threads of a row hold one word of 8 each).
    """
    return plgpu.TilingTransform((8, 32))


def _four() -> Any:
    return ir.VectorType.get((4,), ir.IntegerType.get_signless(32))


def nothing(tall: int, columns: int) -> Callable[[], Float[Array, "rows count"]]:
    """A sum of zero."""
    kind = plgpu.ShapeDtypeStruct((BLOCK * tall, 8 * columns), jnp.float32, plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(return_type=kind)
    def zero(_: Any) -> Any:
        real = arith.constant(ir.F32Type.get(), ir.FloatAttr.get(ir.F32Type.get(), 0.0))
        return array([together(real, real)] * (2 * tall * columns), kind)

    return zero


def _mma(a: list[Any], b: list[Any], c: list[Any]) -> list[Any]:
    """c + a b, of m16n8k16."""
    real = ir.F32Type.get()
    kind = llvm.StructType.get_literal([real] * 4)
    out = llvm.inline_asm(
        kind,
        [*a, *b, *c],
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        has_side_effects=False,
        asm_dialect=0,
    )
    return [llvm.extractvalue(real, out, [i]) for i in range(4)]


def multiplied(tall: int, columns: int, folded: bool) -> Callable[..., Float[Array, "rows count"]]:
    """(words of a group, its x, its scales, sum) -> the sum plus the group's product.

    Scales multiply the product, in float32, or the weights, rounded to bf16 (`folded`).
    """
    kind = plgpu.ShapeDtypeStruct((BLOCK * tall, 8 * columns), jnp.float32, plgpu.Layout.WGMMA)
    scales_kind = plgpu.Layout.WGMMA.reduce(1)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType((lines(),)), scales_kind, plgpu.Layout.WGMMA), return_type=kind
    )
    def step(_: Any, words: Any, x: Any, scales: Any, total: Any) -> Any:
        lane, warp = thread()
        of = scales.registers.reshape(-1, 2)
        sums = [[part(held, e) for held in pair for e in (0, 1)] for pair in total.registers.reshape(-1, 2)]
        real = ir.F32Type.get()
        zero = arith.constant(real, ir.FloatAttr.get(real, 0.0))
        products = sums if folded else [[zero] * 4 for _ in sums]
        held = [
            [
                llvm.load(_four(), place(words, add(times(add(warp, 4 * block), 64), 32 * late, lane), _four()))
                for late in (0, 1)
            ]
            for block in range(tall)
        ]
        of_rows = [
            [factors(part(of[block, late], 0)) if folded else tuple(map(value, UNSCALED)) for late in (0, 1)]
            for block in range(tall)
        ]
        for i in range(4):
            pieces = [
                llvm.load(_four(), place(x, add(lane, 32 * (4 * column + i)), _four())) for column in range(columns)
            ]
            for block in range(tall):
                pairs = [weights(part(held[block][late], i), of_rows[block][late]) for late in (0, 1)]
                for half in (0, 1):
                    a = [pairs[late][2 * half + late_k] for late_k, late in itertools.product((0, 1), (0, 1))]
                    for column in range(columns):
                        b = [part(pieces[column], 2 * half + late_k) for late_k in (0, 1)]
                        at = block * columns + column
                        products[at] = _mma(a, b, products[at])
        registers = []
        for block, column in itertools.product(range(tall), range(columns)):
            product, before = products[block * columns + column], sums[block * columns + column]
            for late in (0, 1):
                pair = product[2 * late : 2 * late + 2]
                if not folded:
                    factor = arith.bitcast(real, arith.shli(part(of[block, late], 0), value(16)))
                    pair = [
                        fma(new, factor, old) for new, old in zip(pair, before[2 * late : 2 * late + 2], strict=True)
                    ]
                registers.append(together(*pair))
        return array(registers, kind)

    return step
