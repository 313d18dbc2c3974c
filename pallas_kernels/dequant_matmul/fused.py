"""One token per sequence through 4-bit weights, with what surrounds the products done in the same launches.

A residual stream travels as three arrays: itself, itself times the weight of the norm that reads it next, and partial
sums of its squares. A norm then costs no launch: `read` multiplies by the prepared stream and by 1 / rms at the end;
`write` adds to the stream and prepares it for the next norm. `read` takes several weights in one launch, one after
another (q, k, v) or row next to row (gate and up, whose activation and product it then takes as well).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels import ahead, blocks, compat, selfcheck
from uniql_jax.pallas_kernels.ahead import Ahead
from uniql_jax.pallas_kernels.dequant_matmul import (
    fused_check,
    mma,
    pallas,
    shares,
    three_bit,
    three_bit_mma,
    three_bit_products,
    tiling,
)
from uniql_jax.pallas_kernels.dequant_matmul.fused_kernels import Job as Job
from uniql_jax.pallas_kernels.dequant_matmul.fused_kernels import programs_of, read_kernel, write_kernel
from uniql_jax.pallas_kernels.dequant_matmul.mma import Settings, parts_of, row_tiles
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight


class Stream(NamedTuple):
    """The residual stream of one token per sequence.

    x: itself; scaled: x times the weight of the norm that reads it next, plain or `in_blocks`; squares: float32 parts
    of the sum of x squared. Both are None where nobody prepared them. counts: what programs that share work count with.
    """

    x: Float[Array, "count h"]
    scaled: Float[Array, "..."] | None = None
    squares: Float[Array, "count parts"] | None = None
    counts: Int[Array, " blocks"] | None = None


def prepare(x: Float[Array, "count h"], norm: Float[Array, " h"]) -> Stream:
    """A stream that comes from no kernel of this file, ready for the norm of weight `norm`."""
    squares = jnp.square(x.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    scaled = x * norm.astype(x.dtype)
    return Stream(x, scaled if x.shape[0] == 1 else blocks.in_blocks(scaled), squares, shares.counts())


def read_settings(jobs: Sequence[Job], count: int) -> Settings:
    """How `read` is cut: a narrow output needs programs that share the contraction to fill the GPU."""
    programs = sum(row_tiles(weights[0]) for job in jobs for weights in job.ranges)
    paired = max(len(job.weights) for job in jobs) > 1
    groups = min(steps_of(weights[0]) for job in jobs for weights in job.ranges)
    fill = tuned_power(groups)
    wide = programs > 512
    make = functools.partial(Settings, gate=True)
    if wide and count <= 8:
        # Where some rows have 3 bits, their registers are there for two groups of the others.
        mixed = paired and any(job.rest for job in jobs)
        batch = 1 if (paired or count == 1) and not mixed else 2
        return make(along_k=min(2 if count > 1 else 4, fill), batch=batch, stream=True)
    if wide:
        return make(along_k=min(2, fill), tiles=1 if paired else 2, zero="mma", stream=True)
    if paired:
        return make(along_k=min(8, fill), zero="mma" if count > 8 else "fma")
    if count <= 8:
        return make(along_k=min(8, fill))
    return _shared(make(along_k=min(2, fill), tiles=2, split=4, zero="mma", stream=True), groups)


def write_settings(weights: Sequence[Weight], count: int) -> Settings:
    """How `write` is cut: its output is as wide as the stream, so that programs must share the contraction."""
    weight, groups = weights[0], sum(map(steps_of, weights))
    fill = tuned_power(groups)
    make = functools.partial(Settings, gate=True)
    if row_tiles(weight) > 512:
        return make(along_k=min(4, fill), zero="mma" if count > 8 else "fma")
    if count == 1:
        return make(along_k=min(16, fill))
    if count <= 8:
        return _shared(make(along_k=min(2, fill), batch=2, split=4, zero="mma", stream=True), groups)
    tiles = 1 if weight.layout == "first" else 2
    return _shared(make(along_k=min(2, fill), tiles=tiles, split=4, zero="mma", stream=True), groups)


def _shared(cut: Settings, groups: int) -> Settings:
    """The same with so many shares that each has work, if possible as many groups as the others."""
    stride = cut.along_k * cut.batch
    most = max(1, min(cut.split, groups // stride))
    even = (split for split in range(most, most // 2, -1) if groups % (stride * split) == 0)
    return dataclasses.replace(cut, split=next(even, most))


def steps_of(weight: Weight) -> int:
    """Steps of a contraction that warps take in turn: groups, or the tiles of 3 bits that span several."""
    return three_bit_mma.steps(weight) if weight.bits == three_bit.BITS else weight.groups


def tuned_power(groups: int) -> int:
    """The most warps, a power of two, of which each finds a group."""
    return 1 << max(0, groups.bit_length() - 1)


def supported(x: Array, weights: Sequence[Weight], count: int) -> None:
    """Raise NotImplementedError for what these kernels cannot do, or were seen to get wrong on this device."""
    compat.triton()
    lacking = pallas.missing()
    if lacking is not None:
        raise NotImplementedError(lacking)
    if count > mma.MOST or x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"fused kernels take up to {mma.MOST} rows of bfloat16, not {count} of {x.dtype}")
    for weight in weights:
        mma.supported(weight, Settings(), count)
        verify("tiles" if weight.layout in tiling.CONTRACTS else "plain")
        if weight.bits == three_bit.BITS:
            three_bit_products.verify("mma", weight.layout)


def verify(layout: str) -> None:
    """Raise NotImplementedError when the kernels are wrong on this device, for weights in "tiles" or "plain"."""
    error = functools.partial(fused_check.error, prepare, read, write, layout == "tiles")
    selfcheck.require(f"fused read and write ({layout})", error)


def read(
    stream: Stream,
    jobs: Sequence[Job],
    operands: Sequence[Sequence[tuple[Array, ...]]],
    *,
    eps: float,
    settings: Settings | None = None,
    coming: Ahead = ahead.NOTHING,
) -> tuple[list[Array], Stream]:
    """Outputs of the jobs on the normed stream: [count, features] bf16, or `in_blocks` where a job wants it; and the
    stream to go on with.

    operands: for every weight of every job (data in tiles, scale), both again for the rest of its rows if the job has
    such, and a bias if it is biased. Without `stream.squares` the
    stream's x counts as normed. `coming` is pulled into the cache meanwhile. Raises NotImplementedError for what the
    kernel cannot do.
    """
    return _read(stream, operands, coming, jobs=tuple(jobs), eps=eps, settings=settings)


# Compiled once for all layers of equal sizes: a kernel's trace takes longer than all the rest of a layer's.
@functools.partial(jax.jit, static_argnames=("jobs", "eps", "settings"))
def _read(
    stream: Stream,
    operands: Sequence[Sequence[tuple[Array, ...]]],
    coming: Ahead,
    *,
    jobs: tuple[Job, ...],
    eps: float,
    settings: Settings | None,
) -> tuple[list[Array], Stream]:
    count, width = stream.x.shape
    weights = [weight for job in jobs for weights in job.ranges for weight in weights]
    supported(stream.x, weights, count)
    if any(weight.layout not in ("rows", "last") for weight in weights):
        raise NotImplementedError("read takes weights that contract their last dimension")
    cut = settings or read_settings(jobs, count)
    normed = stream.squares is not None
    refs: list[Any] = [stream.scaled, stream.squares] if normed else [stream.x]
    for job, held in zip(jobs, operands, strict=True):
        refs += [part for i in range(len(job.ranges)) for weight in held for part in weight[2 * i : 2 * i + 2]]
    refs += [weight[-1] for job, held in zip(jobs, operands, strict=True) if job.biased for weight in held]
    refs += coming.arrays
    shapes = [blocks.shape(count, job.features, job.blocked) for job in jobs]
    if any(job.blocked and job.features % tiling.GROUP for job in jobs):
        raise NotImplementedError("only whole groups are laid out in blocks")
    programs = sum(job.programs(cut) for job in jobs)
    wide = {len(job.weights) for job in jobs}
    cut, counting = _counting(cut, stream, programs, jobs[0].weights, count, max(wide))
    if counting and len(wide) > 1:
        raise NotImplementedError("jobs of one and of two weights do not share their programs' work alike")
    static = dict(jobs=jobs, settings=cut, count=count, width=width, eps=eps, normed=normed, pull=coming.pull)
    outs: Any = compat.call(
        functools.partial(read_kernel, **static),
        name="read_" + "_".join(str(job.features) for job in jobs),
        grid=(programs, cut.split),
        out_shape=[*(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes), *counting[1:]],
        warps=cut.along_k * cut.along_n,
        aliases={len(refs): len(jobs)} if counting else {},
    )(*refs, *counting[:1])
    outs = list(outs)
    return outs[: len(jobs)], stream._replace(counts=outs[len(jobs)]) if counting else stream


def _counting(
    cut: Settings, stream: Stream, programs: int, weights: Sequence[Weight], count: int, wide: int = 1
) -> tuple[Settings, tuple[Any, ...]]:
    """The settings, and what sharing takes: counts, and the shapes of counts and parts after. Nothing where nobody
    shares, as when there are more blocks than counts.
    """
    if cut.split == 1 or programs > shares.COUNTS:
        return dataclasses.replace(cut, split=1), ()
    counts = shares.counts() if stream.counts is None else stream.counts
    slots = cut.tiles * wide * parts_of(weights[0]) * (1 if count <= 8 else 2)
    total = (32 * cut.along_n, 4, *(2,) * (slots - 1).bit_length())
    parts = shares.parts_shape(cut.split, programs, total)
    return cut, (counts, jax.ShapeDtypeStruct(counts.shape, jnp.int32), parts)


def write(
    hidden: Float[Array, "..."],
    weights: Weight | tuple[Weight, ...],
    operands: tuple[Array, ...],
    stream: Stream,
    norm: Float[Array, " h"],
    *,
    settings: Settings | None = None,
    coming: Ahead = ahead.NOTHING,
) -> Stream:
    """The stream plus the product of `hidden` ([count, K] or `in_blocks`) and the weight, ready for the next norm.

    weights: one that contracts its first dimension, or several of different bits that share out the contraction, one
    after another; operands: (data, scale) of each, and perhaps a bias; norm: weight of the norm that reads the stream
    next. `coming` is pulled into the cache meanwhile. Raises NotImplementedError for what
    the kernel cannot do.
    """
    weights = (weights,) if isinstance(weights, Weight) else weights
    return _write(hidden, operands, stream, norm, coming, weights=weights, settings=settings)


@functools.partial(jax.jit, static_argnames=("weights", "settings"))
def _write(
    hidden: Array,
    operands: tuple[Array, ...],
    stream: Stream,
    norm: Array,
    coming: Ahead,
    *,
    weights: tuple[Weight, ...],
    settings: Settings | None,
) -> Stream:
    count, width = stream.x.shape
    supported(hidden, weights, count)
    weight = weights[0]
    if any(each.layout not in ("groups", "first") for each in weights):
        raise NotImplementedError("write takes a weight that contracts its first dimension")
    if len({(parts_of(each), each.features) for each in weights}) > 1:
        raise NotImplementedError("weights that share a contraction are cut into rows alike")
    if hidden.ndim == 4 and weight.group != tiling.GROUP:
        raise NotImplementedError(f"blocks hold whole groups of {tiling.GROUP}, not of {weight.group}")
    if count > 1 and width % blocks.BLOCK:
        raise NotImplementedError(f"a stream of width {width} is no whole number of blocks of {blocks.BLOCK}")
    cut = settings or write_settings(weights, count)
    programs = programs_of(weight, cut)
    cut, counting = _counting(cut, stream, programs, [weight], count)
    refs = (hidden, *operands, stream.x, norm, *coming.arrays)
    biased = len(operands) > 2 * len(weights)
    static = dict(weights=weights, settings=cut, count=count, biased=biased, pull=coming.pull)
    x, scaled, squares, *counts = compat.call(
        functools.partial(write_kernel, **static),
        name=f"write_{sum(each.groups * each.group for each in weights)}",
        grid=(programs, cut.split),
        out_shape=[
            jax.ShapeDtypeStruct((count, width), jnp.bfloat16),
            jax.ShapeDtypeStruct(blocks.shape(count, width, True), jnp.bfloat16),
            jax.ShapeDtypeStruct((count, programs), jnp.float32),
            *counting[1:],
        ],
        warps=cut.along_k * cut.along_n,
        aliases={len(refs): 3} if counting else {},
    )(*refs, *counting[:1])
    return Stream(x, scaled, squares, counts[0] if counts else stream.counts)
