"""How the programs of a cluster add up what each found of one contraction, without another launch.

Each program owns some of the rows of a tile; the others store their sums of those straight into its shared memory,
where a barrier counts the bytes that came. A sum lies as wgmma's do: a warpgroup holds blocks of 64 rows of the weight,
16 a warp, times columns of 8 rows of x. The 16 rows that are number u of a cluster's tile belong to program
u % cluster.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uniql_jax.pallas_kernels.compat import arith, ir, llvm, pl
from uniql_jax.pallas_kernels.compat import mosaic as mgpu
from uniql_jax.pallas_kernels.compat import mosaic_gpu as plgpu
from uniql_jax.pallas_kernels.dequant_matmul.hopper.ptx import (
    add,
    asm,
    below,
    bits,
    both,
    do,
    equal,
    part,
    place,
    thread,
    times,
    value,
    when,
)


class Box(NamedTuple):
    """Shared memory of a program."""

    parts: Any
    """What came, [buffer, source, sixteen of rows, column, 128]."""
    full: Any
    """A barrier of 8 bytes for each buffer."""
    everyone: Any
    """A barrier of all warpgroups that multiply, where there are two buffers."""


@dataclasses.dataclass(frozen=True)
class Handover:
    """Who adds up what."""

    cluster: int
    """Programs that share a contraction."""
    along_k: int
    """Warpgroups of a program that do."""
    along_n: int
    """Warpgroups of a program next to each other."""
    tall: int
    """Blocks of 64 rows of each."""
    columns: int
    """Eights of rows of x."""
    buffers: int
    """2 where a program has several tiles after each other."""

    @property
    def units(self) -> int:
        """Sixteens of rows that a program owns."""
        return 4 * self.tall * self.along_n // self.cluster

    @property
    def sources(self) -> int:
        """Sums of which one result is made."""
        return self.cluster * self.along_k

    @property
    def bytes(self) -> int:
        """What a program is sent for a tile."""
        return 512 * self.sources * self.units * self.columns

    def scratch(self) -> Box:
        """The shared memory to allocate."""
        consumers = self.along_k * self.along_n
        return Box(
            parts=plgpu.SMEM((self.buffers, self.sources, self.units, self.columns, 128), jnp.float32),
            full=plgpu.SMEM((32,), jnp.int32),
            everyone=plgpu.Barrier(num_arrivals=consumers) if self.buffers > 1 else None,
        )

    def open(self, box: Box) -> None:
        """Make the barriers ready and signal the cluster: each warpgroup once, those that multiply first of all."""
        _opened(self)(box.full)

    def around(self, box: Box, load: Callable[[], Any]) -> None:
        """`open`, `load` and `meet` for the warpgroup that copies, loading first where it can.

        With more than one tile it cannot: those that multiply would wait for it in `finish`, and it for their slots.
        """
        if self.buffers > 1:
            self.open(box)
        load()
        if self.buffers == 1:
            self.open(box)
        self.meet()

    def meet(self) -> None:
        """Wait until all programs of the cluster are open: each warpgroup once, those that multiply in `finish`."""
        _met()()

    def finish(
        self, box: Box, out_ref: Any, number: Array, m: Array, n: Array, total: Float[Array, "rows count"]
    ) -> None:
        """Send the sum of tile `number` of this program, add up what others sent and store it, bf16.

        The tile's first row of x is `m`, its first row of the weight `n`, both of the cluster's whole tile.
        """
        me, rank = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("rank")
        k_part, n_part = jax.lax.rem(me, self.along_k), jax.lax.div(me, self.along_k)
        buffer, phase = jax.lax.rem(number, self.buffers), jax.lax.rem(jax.lax.div(number, self.buffers), 2)
        pl.when(number == 0)(self.meet)
        _sent(self)(box.parts, box.full, buffer, rank, k_part, n_part, total)
        _added_up(self, *out_ref.shape)(box.parts, box.full, out_ref, buffer, phase, rank, m, n, me)
        if self.buffers > 1:  # who sends for the next tile has read what it was sent for this one
            plgpu.barrier_arrive(box.everyone)
            plgpu.barrier_wait(box.everyone)


def _item(scalar: Any) -> Any:
    return scalar.registers.item()


def _barrier(ref: Any, buffer: Any) -> Any:
    return place(ref, times(buffer, 2), ir.IntegerType.get_signless(32))


def _opened(over: Handover) -> Callable[[Any], None]:
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def start(_: Any, ref: Any) -> None:
        first = equal(mgpu.utils.thread_idx(), 0)
        for buffer in range(over.buffers):
            barrier = _barrier(ref, value(buffer))
            when(first, "mbarrier.init.shared::cta.b64 [$1], 1;", barrier)
            when(first, "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], $2;", barrier, over.bytes)
        do("fence.mbarrier_init.release.cluster;")
        do("barrier.cluster.arrive.relaxed.aligned;")

    return start


def _met() -> Callable[[], None]:
    @plgpu.inline_mgpu()
    def wait(_: Any) -> None:
        do("barrier.cluster.wait.acquire.aligned;")

    return wait


def _sent(over: Handover) -> Callable[..., None]:
    """(parts, barriers, buffer, rank, the warpgroup's part of k, of n, sum) -> nothing."""
    scalar = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), *[scalar] * 4, plgpu.Layout.WGMMA))
    def send(_: Any, parts: Any, full: Any, buffer: Any, rank: Any, k_part: Any, n_part: Any, total: Any) -> None:
        four = ir.VectorType.get((4,), ir.F32Type.get())
        lane, warp = thread()
        source = add(times(_item(rank), over.along_k), _item(k_part))
        source = add(times(_item(buffer), over.sources), source)
        sums = [[part(held, e) for held in pair for e in (0, 1)] for pair in total.registers.reshape(-1, 2)]
        barrier = _barrier(full, _item(buffer))
        for block in range(over.tall):
            unit = add(times(_item(n_part), 4 * over.tall), 4 * block, warp)
            owner, slot = arith.remui(unit, value(over.cluster)), arith.divui(unit, value(over.cluster))
            theirs = asm("mapa.shared::cluster.u32 $0, $1, $2;", barrier, owner)
            first = times(add(times(source, over.units), slot), over.columns)
            for column in range(over.columns):
                here = place(parts, add(times(add(first, column), 32), lane), four)
                there = asm("mapa.shared::cluster.u32 $0, $1, $2;", here, owner)
                do(
                    "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [$0], {$1, $2, $3, $4}, [$5];",
                    there,
                    *sums[block * over.columns + column],
                    theirs,
                )

    return send


def _added_up(over: Handover, count: int, features: int) -> Callable[..., None]:
    """(parts, barriers, out [count, features], buffer, its phase, rank, first row of x, of the weight, warpgroup)."""
    scalar, numbers = plgpu.Layout.WG_SPLAT, over.units * over.columns * 128
    threads = 128 * over.along_k * over.along_n

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * 3, *[scalar] * 6))
    def collect(
        _: Any,
        parts: Any,
        full: Any,
        out: Any,
        buffer: Any,
        phase: Any,
        rank: Any,
        m_first: Any,
        n_first: Any,
        warpgroup: Any,
    ) -> None:
        lane, warp = thread()
        index = add(times(add(times(_item(warpgroup), 4), warp), 32), lane)
        barrier = _barrier(full, _item(buffer))
        wait = "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [$0], $1; @!p bra again;"
        do("{ .reg .pred p; " + wait + " }", barrier, _item(phase))
        if over.buffers > 1:
            text = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], $2;"
            when(equal(index, 0), text, barrier, over.bytes)
        real = ir.F32Type.get()
        base = times(_item(buffer), over.sources * numbers)
        for start in range(0, numbers, threads):
            # Neighbours take neighbouring rows of the weight, which are neighbours in the output.
            number = add(index, start)
            inside = below(number, numbers)
            number = times(number, inside)
            late, row, m = bits(number, 1, 3), bits(number, 7), bits(number, 7, 4)
            column = bits(number, 2**32 - 1, 7)
            held = add(times(column, 128), times(row, 16), times(bits(m, 3, 1), 4), times(late, 2), bits(m, 1))
            held = add(base, held)
            sums = [
                llvm.load(real, place(parts, add(held, source * numbers), real), alignment=4)
                for source in range(over.sources)
            ]
            while len(sums) > 1:
                sums = [arith.addf(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
            unit, column = arith.divui(column, value(over.columns)), arith.remui(column, value(over.columns))
            n = add(_item(n_first), times(add(_item(rank), times(unit, over.cluster)), 16), times(late, 8), row)
            m = add(_item(m_first), times(column, 8), m)
            inside = both(inside, below(m, count), below(n, features))
            target = place(out, times(add(times(m, features), n), inside), ir.BF16Type.get())
            rounded = asm("cvt.rn.bf16x2.f32 $0, $1, $1;", sums[0])
            text = ".reg .b16 low, high; mov.b32 {low, high}, $2; @p st.global.b16 [$1], low;"
            when(inside, text, target, rounded, guarded=True)

    return collect
