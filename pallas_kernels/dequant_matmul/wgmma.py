"""Many rows of x times a 4-bit weight on Hopper: unpacked weights are A of wgmma, from registers, and x its B.

One warpgroup of a program copies x and packed words to shared memory (TMA, rings of slots, x to a whole cluster at
once), two or more multiply, 64 rows of the weight at a time, with all of a tile of x. Weights become bf16, times their
scale, while the tensor cores work on what the warpgroup gave them before.

A tile of `tiling` is the fragment of one warp but for the order of its columns: thread t of a row holds word 4 i + t,
eight neighbours, where wgmma wants pair t of each word. Either the four threads of a row exchange pairs (`exchange`),
or x is permuted alike, outside.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import compat
from pallas_kernels.compat import mosaic_gpu as plgpu
from pallas_kernels.compat import pl
from pallas_kernels.dequant_matmul import tiling
from pallas_kernels.dequant_matmul import wgmma_registers as registers
from pallas_kernels.dequant_matmul.tiling import Weight
from pallas_kernels.dequant_matmul.wgmma_registers import BLOCK, CHUNK, HALF, LEAST

AHEAD = 2
"""Groups whose scales are on their way to registers."""
SHARED = 227 * 1024
"""Bytes of shared memory that a program of Hopper may have."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the work is cut, and how far ahead it is loaded."""

    tile_m: int = 128
    """Rows of x of a program: 8 (where the contraction is shared), 16, 32, or a multiple of 64 up to 256."""
    tall: int = 1
    """Blocks of 64 weight rows that each multiplying warpgroup holds; tile_m * tall is at most 256."""
    x_slots: int = 4
    """Slots of half a group of x."""
    word_slots: int = 4
    """Slots of a group of packed words."""
    split: int = 1
    """Programs that share a contraction; their float32 parts are added by XLA."""
    cluster: int = 1
    """Programs of neighbouring rows that load x together."""
    exchange: bool = True
    """Threads exchange what they unpack; else x is permuted outside."""
    programs: int = 0
    """Programs at once, each with its share of the tiles; 0 asks the device for its SMs."""
    consumers: int = 2
    """Warpgroups that multiply, 2 to 4; the more there are, the fewer registers each has."""


class Plan(NamedTuple):
    """What a launch is cut into."""

    along_m: int
    along_n: int
    """Tiles of x, and clusters of tiles of the weight."""
    per_share: int
    """Groups of a share of the contraction."""
    clusters: int
    """Clusters that run at once."""
    rows: int
    """Weight rows of a program."""

    @property
    def tiles(self) -> int:
        return self.along_m * self.along_n


class Rings(NamedTuple):
    """Shared memory, and who waits for whom: [slot] each."""

    x: Any
    words: Any
    out: Any
    x_full: Any
    x_free: Any
    words_full: Any
    words_free: Any


def _each_tile(plan: Plan, weight: Weight, settings: Settings, body: Callable[..., Array]) -> Array:
    """body(m, n, share, first group, groups, groups before) for each tile of this program, m fastest.

    It returns the groups up to here, which say where in the rings the next ones are; so does this function at last.
    """
    program = jax.lax.axis_index("program")
    total = plan.tiles * settings.split

    def one(index: Array, done: Array) -> Array:
        tile = program + index * plan.clusters
        share, tile = jax.lax.div(tile, plan.tiles), jax.lax.rem(tile, plan.tiles)
        n, m = jax.lax.div(tile, plan.along_m), jax.lax.rem(tile, plan.along_m)
        if settings.cluster > 1:
            n = n * settings.cluster + jax.lax.axis_index("neighbour")
        first = share * plan.per_share
        groups = jnp.clip(weight.groups - first, 0, plan.per_share)
        return body(m * settings.tile_m, n * plan.rows, share, first, groups, done)

    mine = jax.lax.div(total - program + plan.clusters - 1, plan.clusters)
    return jax.lax.fori_loop(0, mine, one, jnp.int32(0))


def _load(x_ref: Any, data_ref: Any, rings: Rings, plan: Plan, weight: Weight, settings: Settings) -> None:
    """What the copying warpgroup does."""
    row_tiles = plan.rows // tiling.ROWS

    def one_tile(m: Array, n: Array, share: Array, first: Array, groups: Array, done: Array) -> Array:
        tiles = pl.ds(jax.lax.div(n, tiling.ROWS), row_tiles)

        def one_group(index: Array, _: Array) -> Array:
            at, group = done + index, first + index
            slot = jax.lax.rem(at, settings.word_slots)

            @pl.when(at >= settings.word_slots)
            def _wait_for_words() -> None:
                plgpu.barrier_wait(rings.words_free.at[slot])

            source = data_ref.at[tiles, group] if weight.order == "rows" else data_ref.at[group, tiles]
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
    tall, tile_m = settings.tall, settings.tile_m
    me = jax.lax.axis_index("warpgroup")
    load_words = registers.words_of(tall, settings.exchange)
    load_scales, unpack = registers.scales_of(tall, weight), registers.weights_of(tall)
    chunk = min(CHUNK[out_ref.dtype.itemsize], tile_m)

    def free(number: Array) -> None:
        plgpu.barrier_arrive(rings.x_free.at[jax.lax.rem(number, settings.x_slots)])

    def one_tile(m: Array, n: Array, share: Array, first: Array, groups: Array, done: Array) -> Array:
        n = n + me * BLOCK * tall

        def accumulate(sum_ref: Any) -> Array:
            def scales_of(group: Array) -> Array:
                return load_scales(scale_ref, n, jnp.minimum(group, weight.groups - 1))

            def one_group(index: Array, ahead: tuple[Array, ...]) -> tuple[Array, ...]:
                at, group = done + index, first + index
                scales, *later = *ahead, scales_of(group + AHEAD)
                slot = jax.lax.rem(at, settings.word_slots)
                plgpu.barrier_wait(rings.words_full.at[slot])
                words = load_words(rings.words.at[slot, pl.ds(4 * tall * me, 4 * tall)])
                for half in (0, 1):
                    number = 2 * at + half
                    weights = unpack(words[half], scales)
                    x_slot = jax.lax.rem(number, settings.x_slots)
                    plgpu.barrier_wait(rings.x_full.at[x_slot])
                    plgpu.wgmma(sum_ref, weights, rings.x.at[x_slot].transpose((1, 0)))
                    # The half before is done: its x, and the registers of its weights, are free.
                    plgpu.wgmma_wait(1)
                    if half:
                        free(number - 1)
                        plgpu.barrier_arrive(rings.words_free.at[slot])
                    else:
                        pl.when(index > 0)(functools.partial(free, number - 1))
                return tuple(later)

            jax.lax.fori_loop(0, groups, one_group, tuple(scales_of(first + i) for i in range(AHEAD)))
            plgpu.wgmma_wait(0)
            pl.when(groups > 0)(lambda: free(2 * (done + groups) - 1))
            return sum_ref[...]

        total = pl.run_scoped(accumulate, plgpu.ACC((BLOCK * tall, tile_m), jnp.float32))
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
    plgpu.wait_smem_to_gmem(0)


def _kernel(
    x_ref: Any,
    data_ref: Any,
    scale_ref: Any,
    out_ref: Any,
    rings: Rings,
    *,
    plan: Plan,
    weight: Weight,
    settings: Settings,
) -> None:
    """refs: x bf16 [count, K], data [major, minor, 256], scale, out [split, count, N rounded up to 16 bytes]."""
    me = jax.lax.axis_index("warpgroup")
    copying, multiplying = registers_of(settings.consumers)

    @pl.when(me < settings.consumers)
    def _multiplying() -> None:
        plgpu.set_max_registers(multiplying, action="increase")
        _multiply(scale_ref, out_ref, rings, plan, weight, settings)

    @pl.when(me == settings.consumers)
    def _copying() -> None:
        plgpu.set_max_registers(copying, action="decrease")
        _load(x_ref, data_ref, rings, plan, weight, settings)


def registers_of(consumers: int) -> tuple[int, int]:
    """Registers a thread, in steps of 8: of the warpgroup that copies, and of those that multiply.

    A launch gives each thread an equal part of Hopper's 64 Ki; what one gives back, the others may take.
    """
    groups, copying = consumers + 1, 40
    all_of_them = 65536 // (128 * groups) // 8 * 8 * groups
    return copying, min(232, (all_of_them - copying) // consumers // 8 * 8)


def arrange(x: Float[Array, "count width"]) -> Float[Array, "count width"]:
    """x in the order in which threads that exchange nothing hold their weights.

    Column 2t + e of a k16 step (i, s) is contracted weight 8 (4i + t) + 4s + e of the group, and column 8 + 2t + e the
    one two further on.
    """
    parts = x.reshape(x.shape[0], -1, 4, 2, 2, 2)  # 32 weights; t, s, late, e
    return parts.transpose(0, 1, 3, 4, 2, 5).reshape(x.shape)


def shared_bytes(settings: Settings, itemsize: int) -> int:
    """Shared memory of a program, barriers aside."""
    x = settings.x_slots * settings.tile_m * HALF * 2
    words = settings.word_slots * settings.consumers * settings.tall * BLOCK * tiling.GROUP // 2
    return x + words + settings.consumers * 2 * min(CHUNK[itemsize], settings.tile_m) * BLOCK * itemsize


def supported(weight: Weight, settings: Settings | None = None) -> None:
    """Raise NotImplementedError for what the kernel cannot do."""
    settings = settings or Settings()
    if plgpu is None:
        raise NotImplementedError(f"JAX {jax.__version__} has no Pallas Mosaic GPU backend")
    if not compat.hopper():
        raise NotImplementedError("wgmma is Hopper's alone")
    if weight.order not in tiling.CONTRACTS or weight.group != tiling.GROUP:
        raise NotImplementedError(f"only tiles of groups of {tiling.GROUP}, not {weight}")
    size, rows = 4 if settings.split > 1 else 2, settings.tile_m
    if (rows % 64 and (rows & (rows - 1) or rows < LEAST[size])) or not 0 < rows * settings.tall <= 256:
        raise NotImplementedError(f"a tile of {settings.tile_m} rows of x and {settings.tall} blocks of the weight")
    if not 2 <= settings.consumers <= 4:
        raise NotImplementedError(f"{settings.consumers} warpgroups that multiply")
    if shared_bytes(settings, size) > SHARED - 2048:
        raise NotImplementedError(f"{settings} needs more shared memory than there is")


def plan_of(count: int, weight: Weight, settings: Settings) -> Plan:
    """How a launch is cut."""
    rows = settings.consumers * BLOCK * settings.tall
    along_m, along_n = -(-count // settings.tile_m), -(-weight.features // (rows * settings.cluster))
    programs = settings.programs or compat.cores()
    clusters = min(max(1, programs // settings.cluster), along_m * along_n * settings.split)
    return Plan(along_m, along_n, -(-weight.groups // settings.split), clusters, rows)


# Compiled once for all weights of equal sizes, as a kernel's trace and lowering take their time.
@functools.partial(jax.jit, static_argnames=("weight", "settings"))
def product(
    x: Float[Array, "count width"],
    data: Int[Array, "..."],
    scale: Float[Array, "c d"],
    *,
    weight: Weight,
    settings: Settings,
) -> Float[Array, "split count features"]:
    """x [count, groups * 128] bf16 times the weight: [1, count, features] bf16, or [split, ...] float32 parts.

    Raises NotImplementedError for what the kernel cannot do.
    """
    supported(weight, settings)
    count = x.shape[0]
    if count % 8:  # wgmma's tiles of x, which TMA cannot cut
        x = jnp.pad(x, ((0, -count % 8), (0, 0)))
    plan = plan_of(count, weight, settings)
    dtype = jnp.dtype(jnp.float32 if settings.split > 1 else jnp.bfloat16)
    whole = 16 // dtype.itemsize  # TMA's rows are multiples of 16 bytes
    features, line = -(-weight.features // whole) * whole, 128 // dtype.itemsize
    rings = Rings(
        x=plgpu.SMEM(
            (settings.x_slots, settings.tile_m, HALF),
            jnp.bfloat16,
            transforms=(plgpu.TilingTransform((8, HALF)), plgpu.SwizzleTransform(128)),
        ),
        words=plgpu.SMEM((settings.word_slots, plan.rows // tiling.ROWS, 256), jnp.int32),
        out=plgpu.SMEM(
            (settings.consumers, 2, BLOCK // line, min(CHUNK[dtype.itemsize], settings.tile_m), line),
            dtype,
            transforms=(plgpu.SwizzleTransform(128),),
        ),
        x_full=plgpu.Barrier(num_barriers=settings.x_slots),
        x_free=plgpu.ClusterBarrier(
            collective_axes=("neighbour",), num_arrivals=settings.consumers, num_barriers=settings.x_slots
        )
        if settings.cluster > 1
        else plgpu.Barrier(num_arrivals=settings.consumers, num_barriers=settings.x_slots),
        words_full=plgpu.Barrier(num_barriers=settings.word_slots),
        words_free=plgpu.Barrier(num_arrivals=settings.consumers, num_barriers=settings.word_slots),
    )
    clustered = dict(cluster=(settings.cluster,), cluster_names=("neighbour",)) if settings.cluster > 1 else {}
    call = plgpu.kernel(
        functools.partial(_kernel, plan=plan, weight=weight, settings=settings),
        out_type=jax.ShapeDtypeStruct((settings.split, count, features), dtype),
        scratch_types=(rings,),
        grid=(plan.clusters,),
        grid_names=("program",),
        num_threads=settings.consumers + 1,
        thread_name="warpgroup",
        kernel_name=f"dequant_wgmma_{weight.order}",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        **clustered,
    )
    # Under vmap, one call after another: how a batch would become part of the grid of clusters was never tried.
    out = jax.custom_batching.sequential_vmap(call)(
        x if settings.exchange else arrange(x),
        data.reshape(*data.shape[:2], -1),
        scale,
    )
    return out[..., : weight.features] if features != weight.features else out
