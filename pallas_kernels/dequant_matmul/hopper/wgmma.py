"""Many rows of x times a 4-bit weight on Hopper: unpacked weights are A of wgmma, from registers, and x its B.

One warpgroup of a program copies x and packed words to shared memory (TMA, rings of slots, x to a whole cluster at
once), two or more multiply, 64 rows of the weight at a time, with all of a tile of x. Weights become bf16, times their
scale, while the tensor cores work on what the warpgroup gave them before.

A tile of `tiling` is the fragment of one warp but for the order of its columns: thread t of a row holds word 4 i + t,
eight neighbours, where wgmma wants pair t of each word. Either the four threads of a row exchange pairs (`exchange`),
or x is permuted alike, outside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels.compat import mosaic_gpu as plgpu
from uniql_jax.pallas_kernels.compat import pl
from uniql_jax.pallas_kernels.dequant_matmul import tiling
from uniql_jax.pallas_kernels.dequant_matmul.hopper import common
from uniql_jax.pallas_kernels.dequant_matmul.hopper import wgmma_registers as registers
from uniql_jax.pallas_kernels.dequant_matmul.hopper.common import BLOCK
from uniql_jax.pallas_kernels.dequant_matmul.hopper.wgmma_plan import Plan, Settings, plan_of, supported
from uniql_jax.pallas_kernels.dequant_matmul.hopper.wgmma_registers import CHUNK, HALF
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight


class Rings(NamedTuple):
    """Shared memory, and who waits for whom: [slot] each."""

    x: Any
    words: Any
    out: Any
    """Staged on their way to memory; None where programs are joined."""
    box: Any
    """A Box, of programs that are joined."""
    x_full: Any
    x_free: Any
    words_full: Any
    words_free: Any


def _each_tile(plan: Plan, weight: Weight, settings: Settings, body: Callable[..., Array]) -> Array:
    """body(number here, m, n, share, first group, groups, groups before) for each tile of this program, m fastest.

    It returns the groups up to here, which say where in the rings the next ones are; so does this function at last.
    """
    program = jax.lax.axis_index("program")
    total = plan.tiles * (1 if plan.handover else settings.split)

    def one(index: Array, done: Array) -> Array:
        tile = program + index * plan.clusters
        share, tile = jax.lax.div(tile, plan.tiles), jax.lax.rem(tile, plan.tiles)
        n, m = jax.lax.div(tile, plan.along_m), jax.lax.rem(tile, plan.along_m)
        if settings.cluster > 1:
            n = n * settings.cluster + jax.lax.axis_index("neighbour")
        if plan.handover:
            share = jax.lax.axis_index("rank")
        first = share * plan.per_share
        groups = jnp.clip(weight.groups - first, 0, plan.per_share)
        return body(index, m * settings.tile_m, n * plan.rows, share, first, groups, done)

    mine = jax.lax.div(total - program + plan.clusters - 1, plan.clusters)
    return jax.lax.fori_loop(0, mine, one, jnp.int32(0))


def _load(x_ref: Any, data_ref: Any, rings: Rings, plan: Plan, weight: Weight, settings: Settings) -> None:
    """What the copying warpgroup does."""
    row_tiles = plan.rows // tiling.ROWS

    def one_tile(_: Array, m: Array, n: Array, share: Array, first: Array, groups: Array, done: Array) -> Array:
        tiles = pl.ds(jax.lax.div(n, tiling.ROWS), row_tiles)

        def one_group(index: Array, _: Array) -> Array:
            at, group = done + index, first + index
            slot = jax.lax.rem(at, settings.word_slots)

            @pl.when(at >= settings.word_slots)
            def _wait_for_words() -> None:
                plgpu.barrier_wait(rings.words_free.at[slot])

            source = data_ref.at[tiles, group] if weight.layout == "rows" else data_ref.at[group, tiles]
            plgpu.copy_gmem_to_smem(source, rings.words.at[slot], rings.words_full.at[slot])
            for half in (0, 1):
                number = 2 * at + half
                x_slot = jax.lax.rem(number, settings.x_slots)

                @pl.when(number >= settings.x_slots)
                def _wait_for_x(x_slot: Array = x_slot) -> None:
                    plgpu.barrier_wait(rings.x_free.at[x_slot])

                plgpu.copy_gmem_to_smem(
                    x_ref.at[pl.ds(m, settings.tile_m), pl.ds((2 * group + half) * HALF, HALF)],
                    rings.x.at[x_slot],
                    rings.x_full.at[x_slot],
                    collective_axes="neighbour" if settings.cluster > 1 else None,
                )
            return jnp.int32(0)

        jax.lax.fori_loop(0, groups, one_group, jnp.int32(0))
        return done + groups

    if plan.handover:
        plan.handover.around(rings.box, lambda: _each_tile(plan, weight, settings, one_tile))
        return
    done = _each_tile(plan, weight, settings, one_tile)
    if settings.cluster == 1:
        return
    # A neighbour may still have to say that it is done with x, which it can only to a program that runs.
    for back in range(settings.x_slots, 0, -1):
        number = 2 * done - back

        @pl.when(number >= 0)
        def _wait_for_neighbours(number: Array = number) -> None:
            plgpu.barrier_wait(rings.x_free.at[jax.lax.rem(number, settings.x_slots)])


def _multiply(scale_ref: Any, out_ref: Any, rings: Rings, plan: Plan, weight: Weight, settings: Settings) -> None:
    """What a multiplying warpgroup does."""
    if plan.handover:
        plan.handover.open(rings.box)
    tall, tile_m, along_k = settings.tall, settings.tile_m, settings.along_k
    me = jax.lax.axis_index("warpgroup")
    k_part, n_part = jax.lax.rem(me, along_k), jax.lax.div(me, along_k)
    load_words = registers.words_of(tall, settings.exchange)
    load_scales, spread = common.scales_of(tall, weight), registers.factors_of(tall)
    unpack = registers.weights_of(tall)
    chunk = CHUNK[out_ref.dtype.itemsize]

    def free(number: Array) -> None:
        plgpu.barrier_arrive(rings.x_free.at[jax.lax.rem(number, settings.x_slots)])

    def one_tile(tile: Array, m: Array, n: Array, share: Array, first: Array, groups: Array, done: Array) -> Array:
        whole, n = n, n + n_part * BLOCK * tall
        skip, rounds = common.dealt(k_part, along_k, done, groups)

        def accumulate(sum_ref: Any) -> Array:
            def scales_at(number: Array) -> Array:
                group = first + skip + number * along_k
                return load_scales(scale_ref, n, jnp.minimum(group, weight.groups - 1))

            def one_group(
                number: Array, nothing: tuple[()], scales: Array, load: Callable[[], Array]
            ) -> tuple[tuple[()], Array]:
                at = done + skip + number * along_k
                slot = jax.lax.rem(at, settings.word_slots)
                plgpu.barrier_wait(rings.words_full.at[slot])
                words = load_words(rings.words.at[slot, pl.ds(4 * tall * n_part, 4 * tall)])
                factors = spread(scales)
                for half in (0, 1):
                    weights = unpack(words[half], *factors)
                    if half:
                        scales = load()
                    x_slot = jax.lax.rem(2 * at + half, settings.x_slots)
                    plgpu.barrier_wait(rings.x_full.at[x_slot])
                    plgpu.wgmma(sum_ref, weights, rings.x.at[x_slot].transpose((1, 0)))
                    # The half before is done: its x, and the registers of its weights, are free.
                    plgpu.wgmma_wait(1)
                    if half:
                        free(2 * at)
                        plgpu.barrier_arrive(rings.words_free.at[slot])
                    else:
                        pl.when(number > 0)(functools.partial(free, 2 * (at - along_k) + 1))
                return nothing, scales

            # With 256 rows of x a turn takes longer than memory does to yield scales.
            common.in_turn(rounds, scales_at, one_group, (), written_out=tile_m < 256)
            plgpu.wgmma_wait(0)
            pl.when(rounds > 0)(lambda: free(2 * (done + skip + (rounds - 1) * along_k) + 1))
            return sum_ref[...] * jnp.float32(2.0**common.LIFT)

        total = pl.run_scoped(accumulate, plgpu.ACC((BLOCK * tall, tile_m), jnp.float32))
        if plan.handover:
            plan.handover.finish(rings.box, out_ref, tile, m, whole, total)
            return done + groups
        stores = [(block, start) for block in range(tall) for start in range(0, tile_m, chunk)]
        for number, (block, start) in enumerate(stores):
            buffer = rings.out.at[me, number % 2]
            # The two buffers alternate within a tile; of an odd number, the first may still be on its way from there.
            plgpu.wait_smem_to_gmem(0 if number == 0 and len(stores) % 2 else 1, wait_read_only=True)
            registers.transposed(tile_m, block, start, out_ref.dtype.itemsize)(buffer, total)
            plgpu.commit_smem()
            width = buffer.shape[-1]
            for line in range(BLOCK // width):
                columns = pl.ds(n + BLOCK * block + line * width, width)
                plgpu.copy_smem_to_gmem(
                    buffer.at[line],
                    out_ref.at[share, pl.ds(m + start, chunk), columns],
                    commit_group=line == BLOCK // width - 1,
                )
        return done + groups

    _each_tile(plan, weight, settings, one_tile)
    if not plan.handover:
        plgpu.wait_smem_to_gmem(0)


def _kernel(*refs: Any, plan: Plan, weight: Weight, settings: Settings) -> None:
    """refs: x bf16 [count, K], data [major, minor, 256], scale, (what the call waits for,) out, Rings.

    out: [split, count, N rounded up to 16 bytes], or [count, N] of joined programs.
    """
    x_ref, data_ref, scale_ref, *_, out_ref, rings = refs
    common.by_warpgroup(
        settings.consumers,
        multiply=lambda: _multiply(scale_ref, out_ref, rings, plan, weight, settings),
        copy=lambda: _load(x_ref, data_ref, rings, plan, weight, settings),
    )


def arrange(x: Float[Array, "count width"]) -> Float[Array, "count width"]:
    """x in the order in which threads that exchange nothing hold their weights.

    Column 2t + e of a k16 step (i, s) is contracted weight 8 (4i + t) + 4s + e of the group, and column 8 + 2t + e the
    one two further on.
    """
    parts = x.reshape(x.shape[0], -1, 4, 2, 2, 2)  # 32 weights; t, s, late, e
    return parts.transpose(0, 1, 3, 4, 2, 5).reshape(x.shape)


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
) -> Float[Array, "split count features"]:
    """x [count, groups * 128] bf16 times the weight: [1, count, features] bf16, or [split, ...] float32 parts.

    Parts only where those who share a contraction are not joined. `after` is an array that the call waits for and does
    not read: what a benchmark chains calls with. Raises NotImplementedError for what the kernel cannot do.
    """
    count = x.shape[0]
    supported(weight, settings, count)
    plan = plan_of(count, weight, settings)
    parts = 1 if settings.joined else settings.split
    dtype = jnp.dtype(jnp.float32 if parts > 1 else jnp.bfloat16)
    whole = 16 // dtype.itemsize  # TMA's rows are multiples of 16 bytes
    features = weight.features if settings.joined else -(-weight.features // whole) * whole
    line = 128 // dtype.itemsize
    readers = settings.consumers // settings.along_k
    rings = Rings(
        x=plgpu.SMEM(
            (settings.x_slots, settings.tile_m, HALF),
            jnp.bfloat16,
            transforms=(plgpu.TilingTransform((8, HALF)), plgpu.SwizzleTransform(128)),
        ),
        words=plgpu.SMEM((settings.word_slots, plan.rows // tiling.ROWS, 256), jnp.int32),
        out=None
        if plan.handover
        else plgpu.SMEM(
            (settings.consumers, 2, BLOCK // line, CHUNK[dtype.itemsize], line),
            dtype,
            transforms=(plgpu.SwizzleTransform(128),),
        ),
        box=plan.handover.scratch() if plan.handover else None,
        x_full=plgpu.Barrier(num_barriers=settings.x_slots),
        x_free=plgpu.ClusterBarrier(collective_axes=("neighbour",), num_arrivals=readers, num_barriers=settings.x_slots)
        if settings.cluster > 1
        else plgpu.Barrier(num_arrivals=readers, num_barriers=settings.x_slots),
        words_full=plgpu.Barrier(num_barriers=settings.word_slots),
        words_free=plgpu.Barrier(num_arrivals=readers, num_barriers=settings.word_slots),
    )
    cluster = (settings.split, "rank") if plan.handover else (settings.cluster, "neighbour")
    out = common.launch(
        functools.partial(_kernel, plan=plan, weight=weight, settings=settings),
        *(x if settings.exchange else arrange(x), data, scale, after),
        name=f"dequant_wgmma_{weight.layout}",
        out=jax.ShapeDtypeStruct((count, features) if plan.handover else (parts, count, features), dtype),
        scratch=rings,
        clusters=plan.clusters,
        consumers=settings.consumers,
        cluster=cluster if cluster[0] > 1 else None,
    )
    if plan.handover:
        return out[None]
    return out[..., : weight.features] if features != weight.features else out
