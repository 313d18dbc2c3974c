"""Few rows of x times a 4-bit weight on Hopper, the contraction shared by the programs of a cluster.

Each program of a cluster reads its part of some rows of the weight, and of x, a group after another, through a ring of
slots that TMA fills far ahead; warps multiply with mma.sync, words becoming bf16 in registers as in mma.py. A program
adds up some of the rows (handover.py), so that nothing is left to another launch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels import compat
from uniql_jax.pallas_kernels.compat import mosaic_gpu as plgpu
from uniql_jax.pallas_kernels.compat import pl
from uniql_jax.pallas_kernels.dequant_matmul import tiling
from uniql_jax.pallas_kernels.dequant_matmul.hopper import cluster_registers as registers
from uniql_jax.pallas_kernels.dequant_matmul.hopper import common
from uniql_jax.pallas_kernels.dequant_matmul.hopper.common import BARRIERS, BLOCK, SHARED, fitting
from uniql_jax.pallas_kernels.dequant_matmul.hopper.handover import Box, Handover
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight

MOST = 64
"""Rows of x."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the work is cut, and how far ahead it is loaded."""

    cluster: int = 2
    """Programs that share a contraction."""
    along_k: int = 4
    """Warpgroups of a program that take its groups in turn."""
    along_n: int = 1
    """Warpgroups of a program next to each other, each with its own rows."""
    tall: int = 1
    """Blocks of 64 weight rows that each multiplying warpgroup holds."""
    slots: int = 8
    """Slots of a group of packed words, a multiple of `along_k`."""
    folded: bool = False
    """Weights are multiplied by their scale, in bf16, before the product; else the product of a group is."""
    programs: int = 0
    """Programs at once; 0 asks the device for its SMs."""


class Plan(NamedTuple):
    """What a launch is cut into."""

    tiles: int
    """Of the weight's rows, one a cluster at a time."""
    rows: int
    """Weight rows of a tile."""
    per_share: int
    """Groups of a program's share of the contraction."""
    clusters: int
    """Clusters that run at once."""
    columns: int
    """Eights of rows of x."""
    handover: Handover


class Shared(NamedTuple):
    """Shared memory, and who waits for whom."""

    x: Any
    """[slot, rows of x, a group]."""
    words: Any
    box: Box
    slots_full: Any
    slots_free: Any


def plan_of(count: int, weight: Weight, settings: Settings) -> Plan:
    """How a launch is cut."""
    rows = BLOCK * settings.tall * settings.along_n
    tiles = -(-weight.features // rows)
    clusters = min(max(1, fitting(settings.programs or compat.cores(), settings.cluster)), tiles)
    columns = -(-count // 8)
    cut = (settings.cluster, settings.along_k, settings.along_n, settings.tall)
    handover = Handover(*cut, columns, buffers=1 if tiles <= clusters else 2)
    return Plan(tiles, rows, -(-weight.groups // settings.cluster), clusters, columns, handover)


def shared_bytes(plan: Plan, settings: Settings) -> int:
    """Shared memory of a program, barriers aside."""
    slot = tiling.GROUP * (plan.columns * 8 * 2 + plan.rows // 2)
    return settings.slots * slot + plan.handover.buffers * plan.handover.bytes


def supported(weight: Weight, settings: Settings, count: int) -> None:
    """Raise NotImplementedError for what the kernel cannot do."""
    common.supported(weight)
    if not 0 < count <= MOST:
        raise NotImplementedError(f"up to {MOST} rows of x, not {count}")
    if settings.cluster not in (2, 4, 8) or (4 * settings.tall * settings.along_n) % settings.cluster:
        raise NotImplementedError(f"a cluster of {settings.cluster} cannot share {settings}'s rows")
    if not 2 <= settings.along_k * settings.along_n <= 4 or settings.along_k & (settings.along_k - 1):
        raise NotImplementedError(f"{settings.along_k} times {settings.along_n} warpgroups that multiply")
    if settings.slots % settings.along_k or settings.slots > 32:
        raise NotImplementedError(f"{settings.slots} slots")
    if shared_bytes(plan_of(count, weight, settings), settings) > SHARED - BARRIERS:
        raise NotImplementedError(f"{settings} needs more shared memory than there is for {count} rows times {weight}")


def _each_tile(plan: Plan, weight: Weight, body: Callable[..., None]) -> None:
    """body(number of the tile here, its first row, first group of the share, groups of it, groups before)."""
    program = jax.lax.axis_index("program")
    first = jax.lax.axis_index("rank") * plan.per_share
    groups = jnp.clip(weight.groups - first, 0, plan.per_share)

    def one(index: Array, _: Array) -> Array:
        body(index, (program + index * plan.clusters) * plan.rows, first, groups, index * groups)
        return jnp.int32(0)

    mine = jax.lax.div(plan.tiles - program + plan.clusters - 1, plan.clusters)
    jax.lax.fori_loop(0, mine, one, jnp.int32(0))


def _load(x_ref: Any, data_ref: Any, shared: Shared, plan: Plan, weight: Weight, settings: Settings) -> None:
    """What the copying warpgroup does."""

    def one_tile(_: Array, n: Array, first: Array, groups: Array, done: Array) -> None:
        tiles = pl.ds(jax.lax.div(n, tiling.ROWS), plan.rows // tiling.ROWS)

        def one_group(index: Array, _: Array) -> Array:
            at, group = done + index, first + index
            slot = jax.lax.rem(at, settings.slots)

            @pl.when(at >= settings.slots)
            def _wait() -> None:
                plgpu.barrier_wait(shared.slots_free.at[slot])

            source = data_ref.at[tiles, group] if weight.layout == "rows" else data_ref.at[group, tiles]
            plgpu.copy_gmem_to_smem(source, shared.words.at[slot], shared.slots_full.at[slot])
            source = x_ref.at[:, pl.ds(group * tiling.GROUP, tiling.GROUP)]
            plgpu.copy_gmem_to_smem(source, shared.x.at[slot], shared.slots_full.at[slot])
            return jnp.int32(0)

        jax.lax.fori_loop(0, groups, one_group, jnp.int32(0))

    plan.handover.around(shared.box, lambda: _each_tile(plan, weight, one_tile))


def _multiply(scale_ref: Any, out_ref: Any, shared: Shared, plan: Plan, weight: Weight, settings: Settings) -> None:
    """What a multiplying warpgroup does."""
    plan.handover.open(shared.box)
    me = jax.lax.axis_index("warpgroup")
    along_k, tall = settings.along_k, settings.tall
    k_part, n_part = jax.lax.rem(me, along_k), jax.lax.div(me, along_k)
    load_scales = common.scales_of(tall, weight)
    nothing = registers.nothing(tall, plan.columns)
    step = registers.multiplied(tall, plan.columns, settings.folded)

    def one_tile(index: Array, n: Array, first: Array, groups: Array, done: Array) -> None:
        mine = n + n_part * BLOCK * tall
        skip, rounds = common.dealt(k_part, along_k, done, groups)

        def scales_at(number: Array) -> Array:
            return load_scales(scale_ref, mine, jnp.minimum(first + skip + number * along_k, weight.groups - 1))

        def one_group(number: Array, total: Array, scales: Array, load: Callable[[], Array]) -> tuple[Array, Array]:
            group = skip + number * along_k
            slot = jax.lax.rem(done + group, settings.slots)
            plgpu.barrier_wait(shared.slots_full.at[slot])
            words = shared.words.at[slot, pl.ds(4 * tall * n_part, 4 * tall)]
            total = step(words, shared.x.at[slot], scales, total)
            plgpu.barrier_arrive(shared.slots_free.at[slot])
            return total, load()

        total = common.in_turn(rounds, scales_at, one_group, nothing())
        lifted = total * jnp.float32(2.0**common.LIFT)
        plan.handover.finish(shared.box, out_ref, index, jnp.int32(0), n, lifted)

    _each_tile(plan, weight, one_tile)


def _kernel(*refs: Any, plan: Plan, weight: Weight, settings: Settings) -> None:
    """refs: x bf16 [count, K], data [major, minor, 256], scale, (what the call waits for,) out [count, N], Shared."""
    x_ref, data_ref, scale_ref, *_, out_ref, shared = refs
    common.by_warpgroup(
        settings.along_k * settings.along_n,
        multiply=lambda: _multiply(scale_ref, out_ref, shared, plan, weight, settings),
        copy=lambda: _load(x_ref, data_ref, shared, plan, weight, settings),
    )


# Compiled once for all weights of equal sizes, as a kernel's trace and lowering take their time.
@functools.partial(jax.jit, static_argnames=("weight", "settings"))
def product(
    x: Float[Array, "count width"],
    data: Int[Array, "..."],
    scale: Float[Array, "c d"],
    *,
    weight: Weight,
    settings: Settings,
    after: Array | None = None,
) -> Float[Array, "1 count features"]:
    """x [count, groups * 128] bf16 times the weight: [1, count, features] bf16.

    `after` is an array that the call waits for and does not read: what a benchmark chains calls with. Raises
    NotImplementedError for what the kernel cannot do.
    """
    count = x.shape[0]
    supported(weight, settings, count)
    plan = plan_of(count, weight, settings)
    shared = Shared(
        x=plgpu.SMEM((settings.slots, 8 * plan.columns, tiling.GROUP), jnp.bfloat16, transforms=(registers.lines(),)),
        words=plgpu.SMEM((settings.slots, plan.rows // tiling.ROWS, 256), jnp.int32),
        box=plan.handover.scratch(),
        slots_full=plgpu.Barrier(num_arrivals=2, num_barriers=settings.slots),
        slots_free=plgpu.Barrier(num_arrivals=settings.along_n, num_barriers=settings.slots),
    )
    out = common.launch(
        functools.partial(_kernel, plan=plan, weight=weight, settings=settings),
        *(x, data, scale, after),
        name=f"dequant_cluster_{weight.layout}",
        out=jax.ShapeDtypeStruct((count, weight.features), jnp.bfloat16),
        scratch=shared,
        clusters=plan.clusters,
        consumers=settings.along_k * settings.along_n,
        cluster=(settings.cluster, "rank"),
    )
    return out[None]
