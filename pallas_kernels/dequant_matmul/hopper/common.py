"""What the two kernels for Hopper share: launch, what fits, how groups are dealt, scales loaded and words unpacked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels import compat
from uniql_jax.pallas_kernels.compat import arith, ir, pl
from uniql_jax.pallas_kernels.compat import mosaic_gpu as plgpu
from uniql_jax.pallas_kernels.dequant_matmul import tiling
from uniql_jax.pallas_kernels.dequant_matmul.hopper.ptx import (
    add,
    array,
    asm,
    bits,
    place,
    thread,
    times,
    together,
    value,
)
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight

BLOCK = 64
"""Rows of the weight that a warpgroup works on at once."""
AHEAD = 2
"""Groups of a warpgroup whose scales are on their way to registers."""
SHARED = 227 * 1024
"""Bytes of shared memory that a program of Hopper may have."""
BARRIERS = 2048
"""Bytes of it that are left to barriers."""
LIFT = 32
"""Binary orders of magnitude by which unpacked weights are too small, and sums must be lifted.

What a scale is multiplied with below must not overflow, so scales are below 2**27, a billion in weights."""
UNSCALED = (0x72007200, 0x70007000, 0xB100B100)
"""`weights`'s factors for a scale of one, as bf16 twice: 2**(133 - LIFT), 2**(129 - LIFT) and -8 * 2**-LIFT."""


def supported(weight: Weight) -> None:
    """Raise NotImplementedError where neither kernel can be used."""
    if plgpu is None:
        raise NotImplementedError(f"JAX {jax.__version__} has no Pallas Mosaic GPU backend")
    if not compat.hopper():
        raise NotImplementedError("these kernels are for Hopper alone")
    if weight.bits != 4:
        raise NotImplementedError(f"these kernels take 4 bits, not {weight.bits}")
    if weight.layout not in tiling.CONTRACTS or weight.group != tiling.GROUP:
        raise NotImplementedError(f"only tiles of groups of {tiling.GROUP}, not {weight}")


def fitting(programs: int, cluster: int) -> int:
    """Clusters that run at once on as many multiprocessors.

    Two always share a unit of the chip; of larger clusters an H100 was seen to hold 30 of 4 and 15 of 8 on its 132, as
    its parts have 16 or 18 each, or fewer.
    """
    return programs // cluster if cluster <= 2 else programs * 10 // 11 // cluster


def registers_of(consumers: int) -> tuple[int, int]:
    """Registers a thread, in steps of 8: of the warpgroup that copies, and of those that multiply.

    A launch gives each thread an equal part of Hopper's 64 Ki; what one gives back, the others may take.
    """
    groups, copying = consumers + 1, 40
    all_of_them = 65536 // (128 * groups) // 8 * 8 * groups
    return copying, min(232, (all_of_them - copying) // consumers // 8 * 8)


def by_warpgroup(consumers: int, multiply: Callable[[], None], copy: Callable[[], None]) -> None:
    """A kernel's body: the last warpgroup of a program copies, the others multiply, with registers to suit."""
    me = jax.lax.axis_index("warpgroup")
    copying, multiplying = registers_of(consumers)

    @pl.when(me < consumers)
    def _multiplying() -> None:
        plgpu.set_max_registers(multiplying, action="increase")
        multiply()

    @pl.when(me == consumers)
    def _copying() -> None:
        plgpu.set_max_registers(copying, action="decrease")
        copy()


def launch(
    kernel: Callable[..., None],
    x: Float[Array, "count width"],
    data: Int[Array, "..."],
    scale: Float[Array, "c d"],
    after: Array | None,
    *,
    name: str,
    out: jax.ShapeDtypeStruct,
    scratch: Any,
    clusters: int,
    consumers: int,
    cluster: tuple[int, str] | None,
) -> Array:
    """One launch of programs of `consumers` warpgroups that multiply and one that copies.

    Args:
        kernel: of refs x bf16 [count rounded up to 8, K], data int32 [major, minor, 256], scale, (after,) out, scratch.
        x: rows.
        data: tiles.
        scale: of the tiles.
        after: an array that the call waits for and does not read, or None.
        name: of the kernel.
        out: shape and dtype of what it writes.
        scratch: shared memory of a program.
        clusters: of programs, or programs.
        consumers: warpgroups that multiply.
        cluster: programs of a cluster, and the name of their axis; None: no clusters.

    Returns:
        What the kernel wrote.
    """
    if x.shape[0] % 8:  # TMA cuts x into eights of rows
        x = jnp.pad(x, ((0, -x.shape[0] % 8), (0, 0)))
    clustered: dict[str, Any] = {} if cluster is None else dict(cluster=cluster[:1], cluster_names=cluster[1:])
    call = plgpu.kernel(
        kernel,
        out_type=out,
        scratch_types=(scratch,),
        grid=(clusters,),
        grid_names=("program",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        **clustered,
    )
    refs = (x, data.reshape(*data.shape[:2], -1), scale) + (() if after is None else (after,))
    # Under vmap, one call after another: how a batch would become part of the grid of clusters was never tried.
    return jax.custom_batching.sequential_vmap(call)(*refs)


def dealt(part: Array, parts: int, before: Array, groups: Array) -> tuple[Array, Array]:
    """Of groups that `parts` warpgroups take in turn: which is the first of this one, and how many it takes.

    `before` groups of other tiles were dealt already, in one series, so that a slot is always the same warpgroup's.
    """
    skip = jax.lax.rem(part + parts - jax.lax.rem(before, parts), parts)
    return skip, jax.lax.div(jnp.maximum(groups - skip, 0) + parts - 1, parts)


def in_turn(
    rounds: Array,
    scales_at: Callable[[Array], Array],
    turn: Callable[..., tuple[Any, Array]],
    carry: Any,
    written_out: bool = True,
) -> Any:
    """turn(number, carry, scales, load) -> (carry, load()) for each number below `rounds`; returns the last carry.

    `load` asks for the scales of AHEAD turns later. To hand loaded scales from one turn to the next waits for them,
    which short turns feel: then AHEAD of them are written out, so that a load lands where the scales just used were.
    That is three times as much to compile.
    """
    first = [scales_at(jnp.int32(i)) for i in range(AHEAD)]

    def one(number: Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
        carry, scales, *later = state
        loaded = scales_at(number + AHEAD)
        carry, _ = turn(number, carry, scales, lambda: loaded)
        return carry, *later, loaded

    if not written_out:
        return jax.lax.fori_loop(0, rounds, one, (carry, *first))[0]

    def some(number: Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
        carry, *scales = state
        for i in range(AHEAD):
            at = AHEAD * number + i
            carry, scales[i] = turn(at, carry, scales[i], lambda at=at: scales_at(at + AHEAD))
        return carry, *scales

    def last(number: Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
        carry, scales, *later = state
        carry, _ = turn(number, carry, scales, lambda: scales)
        return carry, *later, later[-1]

    whole = jax.lax.div(rounds, AHEAD)
    state = jax.lax.fori_loop(0, whole, some, (carry, *first))
    return jax.lax.fori_loop(AHEAD * whole, rounds, last, state)[0]


def scales_of(tall: int, weight: Weight) -> Callable[[Any, Any, Any], Int[Array, " rows"]]:
    """The scales of a group (16 bits each) for rows r and r + 8 of each warp, straight from memory."""
    kind = plgpu.ShapeDtypeStruct((BLOCK * tall,), jnp.int32, plgpu.Layout.WGMMA.reduce(1))
    scalar = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), scalar, scalar), return_type=kind)
    def load(_: Any, ref: Any, row: Any, group: Any) -> Any:
        lane, warp = thread()
        first, group = add(row.registers.item(), times(warp, 16), bits(lane, 7, 2)), group.registers.item()
        held = []
        for late in range(0, BLOCK * tall, 8):
            if late % BLOCK > 8:
                continue
            n = arith.minui(add(first, late), value(weight.features - 1))  # what lies beyond is not stored
            if weight.layout == "rows":
                at = add(times(n, weight.groups), group)
            else:
                at = add(times(group, weight.features), n)
            # With an effect, so that it is issued here, long before its use.
            address = place(ref, at, ir.IntegerType.get_signless(16))
            held.append(together(asm("ld.global.nc.u16 $0, [$1];", address, effects=True)))
        return array(held, kind)

    return load


def factors(scale: Any) -> tuple[Any, Any, Any]:
    """What `weights` takes for a scale, bf16 in the lower 16 bits; both are called inside `inline_mgpu`."""
    pair = asm("prmt.b32 $0, $1, $1, 0x1010;", scale)
    even, odd, centre = (asm("fma.rn.bf16x2 $0, $1, $2, $3;", pair, each, 0x80008000) for each in UNSCALED)
    return even, odd, centre


def weights(word: Any, of: tuple[Any, Any, Any]) -> list[Any]:
    """The four pairs of a word, two bf16 each: (q - 8) * scale * 2**-LIFT, rounded once.

    Four bits at the foot of a bf16 are that multiple of its least number, 2**-133, and sixteen times as much four
    places up, whose highest bit is the exponent's lowest: numbers below twice the least normal one are evenly spaced.
    So one shift serves a word, and one fma both centres and scales.
    """
    even, odd, centre = of
    pairs = []
    for held in (word, arith.shrui(word, value(8))):
        for mask, factor in ((0x000F000F, even), (0x00F000F0, odd)):
            pairs.append(asm("fma.rn.bf16x2 $0, $1, $2, $3;", arith.andi(held, value(mask)), factor, centre))
    return pairs
