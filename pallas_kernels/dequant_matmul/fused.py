"""One token per sequence through 4-bit weights, with what surrounds the products done in the same launches.

A residual stream travels as three arrays: itself, itself times the weight of the norm that reads it next, and partial
sums of its squares. A norm then costs no launch: `read` multiplies by the prepared stream and by 1 / rms at the end;
`write` adds to the stream and prepares it for the next norm. `read` takes several weights in one launch, one after
another (q, k, v) or row beside row (gate and up, whose activation and product it then takes as well).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import compat
from pallas_kernels.compat import pl
from pallas_kernels.dequant_matmul import mma, pallas, selfcheck, shares, tiling
from pallas_kernels.dequant_matmul.mma import Settings, Source, accumulate, add_up, parts_of, places, row_tiles
from pallas_kernels.dequant_matmul.tiling import Weight
from pallas_kernels.dequant_matmul.warp import Threads

BLOCK = 32
"""Contracted weights that a row of a block of x holds (see `in_blocks`)."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": lambda x: x / (1.0 + jnp.exp(-x)),
    "relu2": lambda x: jnp.square(jnp.maximum(x, 0.0)),
}


class Stream(NamedTuple):
    """The residual stream of one token per sequence.

    x: itself; scaled: x times the weight of the norm that reads it next, plain or `in_blocks`; squares: float32 parts
    of the sum of x squared. Both are None where nobody prepared them. counts: what programs that share work count with.
    """

    x: Float[Array, "count h"]
    scaled: Float[Array, "..."] | None = None
    squares: Float[Array, "count parts"] | None = None
    counts: Int[Array, " blocks"] | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """One output of `read`: the product with one weight, or of a gate and an up that go row beside row."""

    weights: tuple[Weight, ...]
    biased: bool = False
    activation: str | None = None
    blocked: bool = False
    """The output goes to a product next, so it is laid out `in_blocks`."""


def in_blocks(x: Float[Array, "count k"]) -> Float[Array, "blocks columns 8 32"]:
    """Rows of x as a warp reads them in whole lines: [k / 32, count / 8, 8, 32]. k is a multiple of 32."""
    count, k = x.shape
    x = jnp.pad(x, ((0, -count % 8), (0, 0)))
    return x.reshape(-1, 8, k // BLOCK, BLOCK).transpose(2, 0, 1, 3)


def from_blocks(x: Float[Array, "blocks columns 8 32"], count: int) -> Float[Array, "count k"]:
    """Inverse of `in_blocks` for `count` rows."""
    return x.transpose(1, 2, 0, 3).reshape(-1, x.shape[0] * BLOCK)[:count]


def prepare(x: Float[Array, "count h"], norm: Float[Array, " h"]) -> Stream:
    """A stream that comes from no kernel of this file, ready for the norm of weight `norm`."""
    squares = jnp.square(x.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    scaled = x * norm.astype(x.dtype)
    return Stream(x, scaled if x.shape[0] == 1 else in_blocks(scaled), squares, shares.counts())


def _shape(count: int, k: int, blocked: bool) -> tuple[int, ...]:
    return (k // BLOCK, -(-count // 8), 8, BLOCK) if blocked and count > 1 else (count, k)


def _put(ref: Any, m: Array, n: Array, value: Array, mask: Array) -> None:
    """Store elements (m, n) of an array that is plain or in blocks."""
    index = (m, n) if ref.ndim == 2 else (n // BLOCK, m // 8, m % 8, n % BLOCK)
    compat.store(ref, index, value, mask)


def _squares_of(squares_ref: Any, columns: int) -> Float[Array, "m parts"]:
    """The parts of the square sum of each row of x. Loaded first and added up last, so that no weight waits for it."""
    count, parts = squares_ref.shape
    m, part = jnp.arange(1 if count == 1 else 8 * columns), jnp.arange(pl.next_power_of_2(parts))
    return compat.load(squares_ref, (m[:, None], part[None, :]), (m < count)[:, None] & (part < parts)[None, :])


def _pick(total: Float[Array, "threads 4 *slots"], slot: Array, wanted: int) -> Float[Array, "threads 4"]:
    """Accumulator number `wanted` out of those that `add_up` joined."""
    chosen = jnp.where(slot == wanted, total, 0.0)
    for _ in range(total.ndim - 2):
        chosen = chosen.sum(axis=-1)
    return chosen


def _rows_inside(weight: Weight, at: Threads, slot: Array, columns: int, count: int) -> Bool[Array, "..."]:
    """Which elements of joined accumulators belong to a row of x."""
    _, m = places(weight, at, 0, 0, slot % columns, slot.ndim - 2)
    return m < count


def _read_kernel(
    *refs: Any, jobs: tuple[Job, ...], settings: Settings, count: int, width: int, eps: float, normed: bool
) -> None:
    """refs: x, (squares,) data and scale of every weight, every bias, (counts,) every output, (counts, parts)."""
    x_ref, rest = refs[0], list(refs[1:])
    shared = (rest.pop(), rest.pop()) if settings.split > 1 else None
    squares_ref = rest.pop(0) if normed else None
    held = [[(rest.pop(0), rest.pop(0)) for _ in job.weights] for job in jobs]
    biases = [[rest.pop(0) for _ in job.weights] if job.biased else [] for job in jobs]
    outs = rest[-len(jobs) :]
    columns = 1 if count <= 8 else 2
    squares = None if squares_ref is None else _squares_of(squares_ref, columns)

    def run(job: Job, held: list[tuple[Any, Any]], biases: list[Any], out_ref: Any, block: Array) -> None:
        weight, wide = job.weights[0], len(job.weights)
        at = Threads.make(settings.along_k, settings.along_n)
        first = (block * settings.along_n + at.warp_n) * settings.tiles
        tiles = [jnp.minimum(first + r, row_tiles(weight) - 1) for r in range(settings.tiles)]
        sources = [Source(*pair, tile) for tile in tiles for pair in held]
        totals = accumulate(x_ref, sources, weight, settings, at, columns, share)
        total, slot = add_up(totals, settings.along_k)
        at = Threads.make(1, settings.along_n)

        def finish(total: Array) -> None:
            scale = None if squares is None else jax.lax.rsqrt(squares.sum(axis=1) / width + eps)  # 1 / rms
            for r in range(settings.tiles):
                tile = (block * settings.along_n + at.warp_n) * settings.tiles + r
                for column in range(columns):
                    n, m = places(weight, at, tile, 0, column)
                    n, m = jnp.broadcast_to(n, (at.row.shape[0], 4)), jnp.broadcast_to(m, (at.row.shape[0], 4))
                    inside = (m < count) & (n < weight.features)
                    values = []
                    for i in range(wide):
                        value = _pick(total, slot, (r * wide + i) * columns + column)
                        if scale is not None and count == 1:
                            value = value * scale.sum()
                        elif scale is not None:
                            of_row = jnp.arange(scale.shape[0])[None, None, :] == m[:, :, None]
                            value = value * jnp.where(of_row, scale[None, None, :], 0.0).sum(axis=-1)
                        if biases:
                            value = value + compat.load(biases[i], (n,), inside).astype(jnp.float32)
                        values.append(value)
                    value = values[0] if job.activation is None else ACTIVATIONS[job.activation](values[0])
                    _put(out_ref, m, n, value if wide == 1 else value * values[1], inside)

        inside = _rows_inside(weight, at, slot, columns, count)
        shares.add_up_shares(total, inside, shared, (share, pl.program_id(0)), settings.split, finish)

    block, share, start = pl.program_id(0), pl.program_id(1), 0
    for job, weights, bias, out in zip(jobs, held, biases, outs, strict=True):
        end = start + _programs(job.weights[0], settings)
        here = functools.partial(run, job, weights, bias, out, block - start)
        if len(jobs) == 1:
            here()
        else:
            pl.when((block >= start) & (block < end))(here)
        start = end


def _write_kernel(*refs: Any, weight: Weight, settings: Settings, count: int, biased: bool) -> None:
    """refs: hidden, data, scale, (bias,) stream, next norm, (counts,) stream, scaled, squares, (counts, parts)."""
    x_ref, data_ref, scale_ref, *rest = refs
    shared = (rest.pop(), rest.pop()) if settings.split > 1 else None
    bias_ref = rest.pop(0) if biased else None
    stream_ref, norm_ref = rest[:2]
    out_ref, scaled_ref, squares_ref = rest[-3:]
    columns, parts = 1 if count <= 8 else 2, parts_of(weight)
    block, ends = pl.program_id(0), Threads.make(1, settings.along_n)
    at = Threads.make(settings.along_k, settings.along_n)

    def place(column: int, r: int, part: int) -> tuple[Array, Array, Array]:
        """Where an accumulator's elements belong, and whether they exist."""
        tile = (block * settings.along_n + ends.warp_n) * settings.tiles + r
        n, m = places(weight, ends, tile, part, column)
        n, m = (jnp.broadcast_to(x, (ends.row.shape[0], 4)) for x in (n, m))
        return n, m, (m < count) & (n < weight.features)

    # Loaded first and used last, so that nothing waits for them.
    slots = [(column, r, part) for column in range(columns) for r in range(settings.tiles) for part in range(parts)]
    before = {}
    for each in slots:
        n, m, inside = place(*each)
        bias = None if bias_ref is None else compat.load(bias_ref, (n,), inside)
        before[each] = compat.load(stream_ref, (m, n), inside), compat.load(norm_ref, (n,), inside), bias
    first = (block * settings.along_n + at.warp_n) * settings.tiles
    tiles = [jnp.minimum(first + r, row_tiles(weight) - 1) for r in range(settings.tiles)]
    sources = [Source(data_ref, scale_ref, tile) for tile in tiles]
    share = pl.program_id(1)
    total, slot = add_up(accumulate(x_ref, sources, weight, settings, at, columns, share), settings.along_k)

    def finish(total: Array) -> None:
        for column in range(columns):
            found: Any = jnp.zeros((ends.row.shape[0], 4), jnp.float32)
            for r in range(settings.tiles):
                for part in range(parts):
                    n, m, inside = place(column, r, part)
                    stream, norm, bias = before[column, r, part]
                    value = _pick(total, slot, (r * parts + part) * columns + column)
                    value = value if bias is None else value + bias.astype(jnp.float32)
                    # Rounded as the product of its own would be, and the sum again, as a stream in bf16 is.
                    value = value.astype(stream.dtype).astype(jnp.float32) + stream.astype(jnp.float32)
                    value = jnp.where(inside, value.astype(stream.dtype).astype(jnp.float32), 0.0)
                    compat.store(out_ref, (m, n), value, inside)
                    _put(scaled_ref, m, n, value * norm.astype(stream.dtype).astype(jnp.float32), inside)
                    found = found + value * value
            # [warps along n, row, lane, late, odd]: what is left after the sum is a row of x, 2 lane + odd.
            found = found.reshape(settings.along_n, 8, 4, 2, 2).sum(axis=3).sum(axis=1).sum(axis=0)
            m = 8 * column + 2 * jnp.arange(4)[:, None] + jnp.arange(2)[None, :]
            compat.store(squares_ref, (m, jnp.broadcast_to(block, m.shape)), found, m < count)

    inside = _rows_inside(weight, ends, slot, columns, count)
    shares.add_up_shares(total, inside, shared, (share, block), settings.split, finish)


def _programs(weight: Weight, settings: Settings) -> int:
    return pl.cdiv(row_tiles(weight), settings.tiles * settings.along_n)


def read_settings(jobs: Sequence[Job], count: int) -> Settings:
    """How `read` is cut: a narrow output needs programs that share the contraction to fill the GPU."""
    programs = sum(row_tiles(job.weights[0]) for job in jobs)
    paired = max(len(job.weights) for job in jobs) > 1
    groups = jobs[0].weights[0].groups
    fill = tuned_power(groups)
    wide = programs > 512
    make = functools.partial(Settings, gate=True)
    if wide and count <= 8:
        batch = 1 if paired or count == 1 else 2
        return make(along_k=min(2 if count > 1 else 4, fill), batch=batch, stream=True)
    if wide:
        return make(along_k=min(2, fill), tiles=1 if paired else 2, zero="mma", stream=True)
    if paired:
        return make(along_k=min(8, fill), zero="mma" if count > 8 else "fma")
    if count <= 8:
        return _shared(make(along_k=min(4, fill), batch=2, split=4), groups)
    return _shared(make(along_k=min(2, fill), tiles=2, split=4, zero="mma", stream=True), groups)


def write_settings(weight: Weight, count: int) -> Settings:
    """How `write` is cut: its output is as wide as the stream, so that programs must share the contraction."""
    groups, fill = weight.groups, tuned_power(weight.groups)
    make = functools.partial(Settings, gate=True)
    if row_tiles(weight) > 512:
        return make(along_k=min(4, fill), zero="mma" if count > 8 else "fma")
    if count == 1:
        return _shared(make(along_k=min(2, fill), batch=2, split=8, stream=True), groups)
    if count <= 8:
        return _shared(make(along_k=min(2, fill), batch=2, split=4, zero="mma", stream=True), groups)
    tiles = 1 if weight.order == "first" else 2
    return _shared(make(along_k=min(2, fill), tiles=tiles, split=4, zero="mma", stream=True), groups)


def _shared(cut: Settings, groups: int) -> Settings:
    """The same with so many shares that each has work, if possible as many groups as the others."""
    stride = cut.along_k * cut.batch
    most = max(1, min(cut.split, groups // stride))
    even = (split for split in range(most, most // 2, -1) if groups % (stride * split) == 0)
    return dataclasses.replace(cut, split=next(even, most))


def tuned_power(groups: int) -> int:
    """The most warps, a power of two, of which each finds a group."""
    return 1 << max(0, groups.bit_length() - 1)


def supported(x: Array, weights: Sequence[Weight], count: int) -> None:
    """Raise NotImplementedError for what these kernels cannot do, or were seen to get wrong on this device."""
    if not pallas.available():
        raise NotImplementedError("these kernels want an NVIDIA GPU of compute capability 8.0 or newer")
    if count > mma.MOST or x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"fused kernels take up to {mma.MOST} rows of bfloat16, not {count} of {x.dtype}")
    for weight in weights:
        mma.supported(weight, Settings(), count)
        if jax.default_backend() == "gpu":
            selfcheck.verify("mma", weight.order)


def read(
    stream: Stream,
    jobs: Sequence[Job],
    operands: Sequence[Sequence[tuple[Array, ...]]],
    *,
    eps: float,
    settings: Settings | None = None,
) -> tuple[list[Array], Stream]:
    """Outputs of the jobs on the normed stream: [count, features] bf16, or `in_blocks` where a job wants it; and the
    stream to go on with.

    operands: for every weight of every job (data in tiles, scale) or (data, scale, bias). Without `stream.squares` the
    stream's x counts as normed. Raises NotImplementedError for what the kernel cannot do.
    """
    return _read(stream, operands, jobs=tuple(jobs), eps=eps, settings=settings)


# Compiled once for all layers of equal sizes: a kernel's trace takes longer than all the rest of a layer's.
@functools.partial(jax.jit, static_argnames=("jobs", "eps", "settings"))
def _read(
    stream: Stream,
    operands: Sequence[Sequence[tuple[Array, ...]]],
    *,
    jobs: tuple[Job, ...],
    eps: float,
    settings: Settings | None,
) -> tuple[list[Array], Stream]:
    count, width = stream.x.shape
    supported(stream.x, [weight for job in jobs for weight in job.weights], count)
    if any(weight.order not in ("rows", "last") for job in jobs for weight in job.weights):
        raise NotImplementedError("read takes weights that contract their last dimension")
    cut = settings or read_settings(jobs, count)
    normed = stream.squares is not None
    refs: list[Any] = [stream.scaled, stream.squares] if normed else [stream.x]
    refs += [part for job in operands for weight in job for part in weight[:2]]
    refs += [weight[2] for job in operands for weight in job if len(weight) > 2]
    shapes = [_shape(count, job.weights[0].features, job.blocked) for job in jobs]
    if any(job.blocked and job.weights[0].features % tiling.GROUP for job in jobs):
        raise NotImplementedError("only whole groups are laid out in blocks")
    programs = sum(_programs(job.weights[0], cut) for job in jobs)
    wide = {len(job.weights) for job in jobs}
    cut, counting = _counting(cut, stream, programs, jobs[0].weights, count, max(wide))
    if counting and len(wide) > 1:
        raise NotImplementedError("jobs of one and of two weights do not share their programs' work alike")
    outs: Any = compat.call(
        functools.partial(_read_kernel, jobs=jobs, settings=cut, count=count, width=width, eps=eps, normed=normed),
        name="read_" + "_".join(str(job.weights[0].features) for job in jobs),
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
    weight: Weight,
    operands: tuple[Array, ...],
    stream: Stream,
    norm: Float[Array, " h"],
    *,
    settings: Settings | None = None,
) -> Stream:
    """The stream plus the product of `hidden` ([count, K] or `in_blocks`) and the weight, ready for the next norm.

    operands: (data, scale) or (data, scale, bias) of a weight that contracts its first dimension; norm: weight of the
    norm that reads the stream next. Raises NotImplementedError for what the kernel cannot do.
    """
    return _write(hidden, operands, stream, norm, weight=weight, settings=settings)


@functools.partial(jax.jit, static_argnames=("weight", "settings"))
def _write(
    hidden: Array,
    operands: tuple[Array, ...],
    stream: Stream,
    norm: Array,
    *,
    weight: Weight,
    settings: Settings | None,
) -> Stream:
    count, width = stream.x.shape
    supported(hidden, [weight], count)
    if weight.order not in ("groups", "first"):
        raise NotImplementedError("write takes a weight that contracts its first dimension")
    if hidden.ndim == 4 and weight.group != tiling.GROUP:
        raise NotImplementedError(f"blocks hold whole groups of {tiling.GROUP}, not of {weight.group}")
    if count > 1 and width % BLOCK:
        raise NotImplementedError(f"a stream of width {width} is no whole number of blocks of {BLOCK}")
    cut = settings or write_settings(weight, count)
    programs = _programs(weight, cut)
    cut, counting = _counting(cut, stream, programs, [weight], count)
    refs = (hidden, *operands, stream.x, norm)
    x, scaled, squares, *counts = compat.call(
        functools.partial(_write_kernel, weight=weight, settings=cut, count=count, biased=len(operands) > 2),
        name=f"write_{weight.groups * weight.group}",
        grid=(programs, cut.split),
        out_shape=[
            jax.ShapeDtypeStruct((count, width), jnp.bfloat16),
            jax.ShapeDtypeStruct(_shape(count, width, True), jnp.bfloat16),
            jax.ShapeDtypeStruct((count, programs), jnp.float32),
            *counting[1:],
        ],
        warps=cut.along_k * cut.along_n,
        aliases={len(refs): 3} if counting else {},
    )(*refs, *counting[:1])
    return Stream(x, scaled, squares, counts[0] if counts else stream.counts)
