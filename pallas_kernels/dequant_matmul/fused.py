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
from jaxtyping import Array, Float

from pallas_kernels import compat
from pallas_kernels.compat import pl
from pallas_kernels.dequant_matmul import mma, selfcheck, tiling
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
    of the sum of x squared. The last two are None where nobody prepared them.
    """

    x: Float[Array, "count h"]
    scaled: Float[Array, "..."] | None = None
    squares: Float[Array, "count parts"] | None = None


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
    return Stream(x, scaled if x.shape[0] == 1 else in_blocks(scaled), squares)


def _shape(count: int, k: int, blocked: bool) -> tuple[int, ...]:
    return (k // BLOCK, -(-count // 8), 8, BLOCK) if blocked and count > 1 else (count, k)


def _put(ref: Any, m: Array, n: Array, value: Array, mask: Array) -> None:
    """Store elements (m, n) of an array that is plain or in blocks."""
    index = (m, n) if ref.ndim == 2 else (n // BLOCK, m // 8, m % 8, n % BLOCK)
    compat.store(ref, index, value, mask)


def _scale_of(squares_ref: Any, columns: int, width: int, eps: float) -> Float[Array, "m"]:
    """1 / rms of each row of x, from the parts of its square sum."""
    count, parts = squares_ref.shape
    m, part = jnp.arange(1 if count == 1 else 8 * columns), jnp.arange(pl.next_power_of_2(parts))
    inside = (m < count)[:, None] & (part < parts)[None, :]
    return jax.lax.rsqrt(compat.load(squares_ref, (m[:, None], part[None, :]), inside).sum(axis=1) / width + eps)


def _pick(total: Float[Array, "threads 4 *slots"], slot: Array, wanted: int) -> Float[Array, "threads 4"]:
    """Accumulator number `wanted` out of those that `add_up` joined."""
    chosen = jnp.where(slot == wanted, total, 0.0)
    for _ in range(total.ndim - 2):
        chosen = chosen.sum(axis=-1)
    return chosen


def _read_kernel(
    *refs: Any, jobs: tuple[Job, ...], settings: Settings, count: int, width: int, eps: float, normed: bool
) -> None:
    """refs: x, (squares,) data and scale of every weight, every bias, every output."""
    refs = tuple(refs)
    x_ref, rest = refs[0], list(refs[1:])
    squares_ref = rest.pop(0) if normed else None
    held = [[(rest.pop(0), rest.pop(0)) for _ in job.weights] for job in jobs]
    biases = [[rest.pop(0) for _ in job.weights] if job.biased else [] for job in jobs]
    outs = rest[-len(jobs) :]
    columns = 1 if count <= 8 else 2
    scale = None if squares_ref is None else _scale_of(squares_ref, columns, width, eps)

    def run(job: Job, held: list[tuple[Any, Any]], biases: list[Any], out_ref: Any, block: Array) -> None:
        weight, wide = job.weights[0], len(job.weights)
        at = Threads.make(settings.along_k, settings.along_n)
        first = (block * settings.along_n + at.warp_n) * settings.tiles
        tiles = [jnp.minimum(first + r, row_tiles(weight) - 1) for r in range(settings.tiles)]
        sources = [Source(*pair, tile) for tile in tiles for pair in held]
        total, slot = add_up(accumulate(x_ref, sources, weight, settings, at, columns), settings.along_k)
        at = Threads.make(1, settings.along_n)
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

    block, start = pl.program_id(0), 0
    for job, weights, bias, out in zip(jobs, held, biases, outs, strict=True):
        end = start + _programs(job.weights[0], settings)
        here = functools.partial(run, job, weights, bias, out, block - start)
        if len(jobs) == 1:
            here()
        else:
            pl.when((block >= start) & (block < end))(here)
        start = end


def _write_kernel(*refs: Any, weight: Weight, settings: Settings, count: int, biased: bool) -> None:
    """refs: hidden, data, scale, (bias,) stream, next norm, (waited for,) outputs: stream, scaled, squares."""
    x_ref, data_ref, scale_ref, *rest = refs
    bias_ref = rest.pop(0) if biased else None
    stream_ref, norm_ref = rest[:2]
    out_ref, scaled_ref, squares_ref = rest[-3:]
    columns, parts = 1 if count <= 8 else 2, parts_of(weight)
    block = pl.program_id(0)
    at = Threads.make(settings.along_k, settings.along_n)
    first = (block * settings.along_n + at.warp_n) * settings.tiles
    tiles = [jnp.minimum(first + r, row_tiles(weight) - 1) for r in range(settings.tiles)]
    sources = [Source(data_ref, scale_ref, tile) for tile in tiles]
    total, slot = add_up(accumulate(x_ref, sources, weight, settings, at, columns), settings.along_k)
    at = Threads.make(1, settings.along_n)
    for column in range(columns):
        found: Any = jnp.zeros((at.row.shape[0], 4), jnp.float32)
        for r in range(settings.tiles):
            for part in range(parts):
                tile = (block * settings.along_n + at.warp_n) * settings.tiles + r
                n, m = places(weight, at, tile, part, column)
                n, m = jnp.broadcast_to(n, found.shape), jnp.broadcast_to(m, found.shape)
                inside = (m < count) & (n < weight.features)
                value = _pick(total, slot, (r * parts + part) * columns + column)
                if bias_ref is not None:
                    value = value + compat.load(bias_ref, (n,), inside).astype(jnp.float32)
                # Rounded as the product of its own would be, and the sum again, as a stream in bf16 is.
                value = value.astype(stream_ref.dtype).astype(jnp.float32)
                value = compat.load(stream_ref, (m, n), inside).astype(jnp.float32) + value
                value = jnp.where(inside, value.astype(stream_ref.dtype).astype(jnp.float32), 0.0)
                compat.store(out_ref, (m, n), value, inside)
                norm = compat.load(norm_ref, (n,), inside).astype(stream_ref.dtype).astype(jnp.float32)
                _put(scaled_ref, m, n, value * norm, inside)
                found = found + value * value
        # [warps along n, row, lane, late, odd]: what is left after the sum is a row of x, 2 lane + odd.
        found = found.reshape(settings.along_n, 8, 4, 2, 2).sum(axis=3).sum(axis=1).sum(axis=0)
        m = 8 * column + 2 * jnp.arange(4)[:, None] + jnp.arange(2)[None, :]
        compat.store(squares_ref, (m, jnp.broadcast_to(block, m.shape)), found, m < count)


def _programs(weight: Weight, settings: Settings) -> int:
    return pl.cdiv(row_tiles(weight), settings.tiles * settings.along_n)


def read_settings(jobs: Sequence[Job], count: int) -> Settings:
    """How `read` is cut: a narrow output needs more warps along the contraction to fill the GPU."""
    programs = sum(row_tiles(job.weights[0]) for job in jobs)
    paired = max(len(job.weights) for job in jobs) > 1
    fill = min(8, tuned_power(jobs[0].weights[0].groups))
    if count <= 8:
        if programs > 512:
            along_k = min(2 if count > 1 else 4, fill)
            return Settings(along_k=along_k, batch=1 if paired or count == 1 else 2, gate=True, stream=True)
        return Settings(along_k=fill, batch=2, gate=True)
    along_k = min(2 if programs > 512 else 4, fill)
    return Settings(along_k=along_k, tiles=1 if paired else 2, zero="mma", gate=True, stream=True)


def write_settings(weight: Weight, count: int) -> Settings:
    """How `write` is cut: its output is as wide as the stream, so that warps along the contraction fill the GPU."""
    fill = min(16, tuned_power(weight.groups))
    wide = row_tiles(weight) > 512
    if count == 1:
        return Settings(along_k=min(4, fill) if wide else fill, gate=True)
    if count <= 8:
        return Settings(along_k=min(8, fill), batch=2, gate=True)
    return Settings(along_k=min(8, fill), zero="mma", gate=True, stream=True)


def tuned_power(groups: int) -> int:
    """The most warps, a power of two, of which each finds a group."""
    return 1 << max(0, groups.bit_length() - 1)


def supported(x: Array, weights: Sequence[Weight], count: int) -> None:
    """Raise NotImplementedError for what these kernels cannot do, or were seen to get wrong on this device."""
    if count > mma.MOST or x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"fused kernels take up to {mma.MOST} rows of bfloat16, not {count} of {x.dtype}")
    for weight in weights:
        if weight.group != tiling.GROUP:
            raise NotImplementedError(f"fused kernels take groups of {tiling.GROUP}, not {weight.group}")
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
    after: Array | None = None,
) -> list[Array]:
    """Outputs of the jobs on the normed stream: [count, features] bf16, or `in_blocks` where a job wants it.

    operands: for every weight of every job (data in tiles, scale) or (data, scale, bias). Without `stream.squares` the
    stream's x counts as normed. Raises NotImplementedError for what the kernel cannot do.
    """
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
    outs: Any = compat.call(
        functools.partial(
            _read_kernel, jobs=tuple(jobs), settings=cut, count=count, width=width, eps=eps, normed=normed
        ),
        name="read_" + "_".join(str(job.weights[0].features) for job in jobs),
        grid=(sum(_programs(job.weights[0], cut) for job in jobs),),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes],
        warps=cut.along_k * cut.along_n,
    )(*refs, *(() if after is None else (after,)))
    return list(outs)


def write(
    hidden: Float[Array, "..."],
    weight: Weight,
    operands: tuple[Array, ...],
    stream: Stream,
    norm: Float[Array, " h"],
    *,
    settings: Settings | None = None,
    after: Array | None = None,
) -> Stream:
    """The stream plus the product of `hidden` ([count, K] or `in_blocks`) and the weight, ready for the next norm.

    operands: (data, scale) or (data, scale, bias) of a weight that contracts its first dimension; norm: weight of the
    norm that reads the stream next. Raises NotImplementedError for what the kernel cannot do.
    """
    count, width = stream.x.shape
    supported(hidden, [weight], count)
    if weight.order not in ("groups", "first"):
        raise NotImplementedError("write takes a weight that contracts its first dimension")
    if count > 1 and width % BLOCK:
        raise NotImplementedError(f"a stream of width {width} is no whole number of blocks of {BLOCK}")
    cut = settings or write_settings(weight, count)
    programs = _programs(weight, cut)
    out: Any = compat.call(
        functools.partial(_write_kernel, weight=weight, settings=cut, count=count, biased=len(operands) > 2),
        name=f"write_{weight.groups * weight.group}",
        grid=(programs,),
        out_shape=[
            jax.ShapeDtypeStruct((count, width), jnp.bfloat16),
            jax.ShapeDtypeStruct(_shape(count, width, True), jnp.bfloat16),
            jax.ShapeDtypeStruct((count, programs), jnp.float32),
        ],
        warps=cut.along_k * cut.along_n,
    )(hidden, *operands, stream.x, norm, *(() if after is None else (after,)))
    return Stream(*out)
