"""What one warp does that is not plain jnp: unpacks words, waits for its loads, multiplies fragments on tensor cores.

A tensor of shape [32 * warps, 4] gives thread i its row of four elements: one 16-byte load, and exactly what a fragment
of mma m16n8k16 wants. The interpreter gets the same functions spelt out lane by lane.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels import compat


def asm(text: str, constraints: str, args: Sequence[Array], dtype: Any, pack: int) -> Array:
    shape = jax.ShapeDtypeStruct(args[0].shape, dtype)
    [out] = compat.triton().elementwise_inline_asm(
        text, args=list(args), constraints=constraints, pack=pack, result_shape_dtypes=[shape]
    )
    return out


def pair(word: Int[Array, "threads 4"], j: int, centred: bool, mask: Array | None) -> Int[Array, "threads 4"]:
    """Weights 2j and 2j + 1 of each word as two bf16: 128 + q, which is an `or`, or exactly q - 8."""
    if compat.interpreted():
        raw = ((word >> (4 * j)) & 0x000F000F) | 0x43004300
        return join(*(half - 136.0 for half in _halves(raw))) if centred else raw
    # and-or is one lop3 here; as jnp operations it becomes two.
    lines = ["{ .reg .b32 w, m, e;", "mov.b32 e, 0x43004300;", f"shr.u32 w, $1, {4 * j};"]
    lines += ["mov.b32 m, 0x000F000F;" if mask is None else "mov.b32 m, $2;", "lop3.b32 w, w, m, e, 0xEA;"]
    if centred:
        lines += ["mov.b32 m, 0x3F803F80;", "mov.b32 e, 0xC308C308;", "fma.rn.bf16x2 w, w, m, e;"]
    args = [word] if mask is None else [word, mask]
    return asm(" ".join([*lines, "mov.b32 $0, w; }"]), ",".join(["=r", *"rr"[: len(args)]]), args, jnp.int32, 1)


def gate(index: Array, threads: int, number: int = 0x000F000F) -> Array | None:
    """A number, which no compiler can know before the barrier that yields it: loads above it stay above."""
    if compat.interpreted():
        return None
    lines = ["{ .reg .pred p;", "setp.ne.s32 p, $4, -1;", "bar.red.or.pred p, 0, p;"]
    lines += [f"selp.b32 ${i}, {number}, 0, p;" for i in range(4)]
    arg = jnp.broadcast_to(index, (threads, 4))
    return asm(" ".join([*lines, "}"]), "=r,=r,=r,=r,r,r,r,r", [arg], jnp.int32, 4)


def _halves(pairs: Int[Array, "..."]) -> tuple[Array, Array]:
    """Low and high bf16 of each 32-bit element, as float32."""
    as_float = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.float32)
    return as_float(pairs << 16), as_float(pairs & jnp.int32(-65536))


def join(low: Float[Array, "..."], high: Float[Array, "..."]) -> Int[Array, "..."]:
    """Inverse of `_halves` for numbers that bf16 holds exactly."""
    bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.int32)
    return jax.lax.shift_right_logical(bits(low), 16) | (bits(high) & jnp.int32(-65536))


def stacked(arrays: Sequence[Array]) -> Array:
    """As many arrays as a power of two, along new last axes of two each: the bits of their number, the highest first.

    What one thread holds stays with it.
    """
    while len(arrays) > 1:
        half = len(arrays) // 2
        arrays = [jnp.stack([arrays[i], arrays[half + i]], axis=-1) for i in range(half)]
    return arrays[0]


Operand = tuple[Array, int]
"""A [threads, 4] tensor and the register of each thread's part of it: an element of 32 bits, or two of 16."""


def multiply(steps: Sequence[tuple[Sequence[Operand], Operand]], total: Array) -> Array:
    """Total [threads, 4] float32 plus A B for each step: four A registers and the first of two B registers."""
    if compat.interpreted():
        for registers, b in steps:
            total = total + _multiply_interpreted([tensor[:, i] for tensor, i in registers], b)
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
    return asm("\n".join(lines), constraints, [total, *tensors.values()], jnp.float32, 4)


def _multiply_interpreted(registers: Sequence[Int[Array, " threads"]], b: Operand) -> Float[Array, "threads 4"]:
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


def zero_point(x: list[list[Operand]], zeros: Array) -> Array:
    """-136 times the sum of x over the group, in every row: an mma whose A is constant."""
    constant = jnp.full(zeros.shape, -1022835960, jnp.int32)  # 0xC308C308, two bf16 -136
    return multiply([(((constant, 0),) * 4, b) for halves in x for b in halves], zeros)
