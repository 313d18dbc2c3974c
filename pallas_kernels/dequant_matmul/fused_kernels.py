"""The kernels of fused.py: products on tensor cores, with the norm before them or the residual sum after them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from uniql_jax.pallas_kernels import blocks, compat
from uniql_jax.pallas_kernels.ahead import Pull
from uniql_jax.pallas_kernels.compat import pl
from uniql_jax.pallas_kernels.dequant_matmul import mma, shares, three_bit, three_bit_mma
from uniql_jax.pallas_kernels.dequant_matmul.mma import (
    Settings,
    Source,
    add_up,
    parts_of,
    places,
    row_tiles,
)
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight
from uniql_jax.pallas_kernels.dequant_matmul.warp import Threads

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": lambda x: x / (1.0 + jnp.exp(-x)),
    "relu2": lambda x: jnp.square(jnp.maximum(x, 0.0)),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One output of `read`: the product with one weight, or of a gate and an up that go row next to row."""

    weights: tuple[Weight, ...]
    """Of one size and as many bits each."""
    biased: bool = False
    activation: str | None = None
    blocked: bool = False
    """The output goes to a product next, so it is laid out `in_blocks`."""
    rest: tuple[Weight, ...] = ()
    """One for each of `weights`, of the same contraction: the rows behind it, which have fewer bits."""

    @property
    def ranges(self) -> tuple[tuple[Weight, ...], ...]:
        """Weights of the first rows, and of those behind them, if there are such."""
        return (self.weights, self.rest) if self.rest else (self.weights,)

    @property
    def features(self) -> int:
        """Rows of each weight."""
        return sum(weights[0].features for weights in self.ranges)

    def programs(self, settings: Settings) -> int:
        """Programs that find the output."""
        return sum(programs_of(weights[0], settings) for weights in self.ranges)


def accumulate(x_ref: Any, sources: list[Source], weight: Weight, *args: Any, first: int = 0) -> list[Array]:
    """mma.accumulate for a weight of 4 bits or 3 whose contraction begins with x's group number `first`."""
    if weight.bits == three_bit.BITS:
        return three_bit_mma.accumulate(x_ref, sources, weight, *args, first=first)
    return mma.accumulate(x_ref, sources, weight, *args)


def programs_of(weight: Weight, settings: Settings) -> int:
    return pl.cdiv(row_tiles(weight), settings.tiles * settings.along_n)


def _squares_of(squares_ref: Any, columns: int) -> Float[Array, "m parts"]:
    """The parts of the square sum of each row of x."""
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


def read_kernel(
    *refs: Any,
    jobs: tuple[Job, ...],
    settings: Settings,
    count: int,
    width: int,
    eps: float,
    normed: bool,
    pull: Pull,
) -> None:
    """refs: x, (squares,) data and scale of every weight, every bias, what to pull, (counts,) every output,
    (counts, parts).
    """
    x_ref, rest = refs[0], list(refs[1:])
    shared = (rest.pop(), rest.pop()) if settings.split > 1 else None
    squares_ref = rest.pop(0) if normed else None
    held = [[[(rest.pop(0), rest.pop(0)) for _ in weights] for weights in job.ranges] for job in jobs]
    biases = [[rest.pop(0) for _ in job.weights] if job.biased else [] for job in jobs]
    pulled = [rest.pop(0) for _ in pull.spans]
    outs = rest[-len(jobs) :]
    columns = 1 if count <= 8 else 2
    # Of one row they are loaded first and added up last, so that no weight waits for them; of several, they would hold
    # too many registers all the while.
    early = None if squares_ref is None or count > 1 else _squares_of(squares_ref, columns)
    program, share = pl.program_id(0), pl.program_id(1)
    programs = sum(job.programs(settings) for job in jobs)
    pull(pulled, program, programs, early=True)

    def run(
        job: Job, weight: Weight, row: int, held: list[tuple[Any, Any]], biases: list[Any], out_ref: Any, block: Array
    ) -> None:
        """A program of those that find the rows of `weight`, which begin with row number `row` of the output."""
        wide = len(job.weights)
        at = Threads.make(settings.along_k, settings.along_n)
        first = (block * settings.along_n + at.warp_n) * settings.tiles
        tiles = [jnp.minimum(first + r, row_tiles(weight) - 1) for r in range(settings.tiles)]
        sources = [Source(*pair, tile) for tile in tiles for pair in held]
        totals = accumulate(x_ref, sources, weight, settings, at, columns, share)
        total, slot = add_up(totals, settings.along_k)
        at = Threads.make(1, settings.along_n)

        def finish(total: Array) -> None:
            scale = None
            if squares_ref is not None:
                squares = _squares_of(squares_ref, columns) if early is None else early
                scale = jax.lax.rsqrt(squares.sum(axis=1) / width + eps)  # 1 / rms
            for r in range(settings.tiles):
                tile = (block * settings.along_n + at.warp_n) * settings.tiles + r
                for column in range(columns):
                    n, m = places(weight, at, tile, 0, column)
                    n, m = jnp.broadcast_to(n, (at.row.shape[0], 4)), jnp.broadcast_to(m, (at.row.shape[0], 4))
                    inside = (m < count) & (n < weight.features)
                    n, values = n + row, []
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
                    value = value if wide == 1 else value * values[1]
                    compat.store(out_ref, blocks.index(out_ref, m, n), value, inside)

        inside = _rows_inside(weight, at, slot, columns, count)
        shares.add_up_shares(total, inside, shared, (share, program), settings.split, finish)

    start = 0
    for job, ranges, bias, out in zip(jobs, held, biases, outs, strict=True):
        row = 0
        for weights, operands in zip(job.ranges, ranges, strict=True):
            end = start + programs_of(weights[0], settings)
            here = functools.partial(run, job, weights[0], row, operands, bias, out, program - start)
            if end - start == programs:
                here()
            else:
                pl.when((program >= start) & (program < end))(here)
            start, row = end, row + weights[0].features
    pull(pulled, program, programs, early=False)


def write_kernel(
    *refs: Any, weights: tuple[Weight, ...], settings: Settings, count: int, biased: bool, pull: Pull
) -> None:
    """refs: hidden, data and scale of every weight, (bias,) stream, next norm, what to pull, (counts,) stream, scaled,
    squares, (counts, parts). `weights` share out the contraction, in this order.
    """
    x_ref, *rest = refs
    weight, held = weights[0], [(rest.pop(0), rest.pop(0)) for _ in weights]
    shared = (rest.pop(), rest.pop()) if settings.split > 1 else None
    bias_ref = rest.pop(0) if biased else None
    stream_ref, norm_ref, *pulled = rest[: 2 + len(pull.spans)]
    out_ref, scaled_ref, squares_ref = rest[-3:]
    columns, parts = 1 if count <= 8 else 2, parts_of(weight)
    block, ends = pl.program_id(0), Threads.make(1, settings.along_n)
    pull(pulled, block, programs_of(weight, settings), early=True)
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
    share, start, totals = pl.program_id(1), 0, []
    for each, pair in zip(weights, held, strict=True):
        sources = [Source(*pair, tile) for tile in tiles]
        found = accumulate(x_ref, sources, each, settings, at, columns, share, first=start)
        totals = [a + b for a, b in zip(totals, found, strict=True)] if totals else found
        start += each.groups
    total, slot = add_up(totals, settings.along_k)

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
                    scaled = value * norm.astype(stream.dtype).astype(jnp.float32)
                    compat.store(scaled_ref, blocks.index(scaled_ref, m, n), scaled, inside)
                    found = found + value * value
            # [warps along n, row, lane, late, odd]: what is left after the sum is a row of x, 2 lane + odd.
            found = found.reshape(settings.along_n, 8, 4, 2, 2).sum(axis=3).sum(axis=1).sum(axis=0)
            m = 8 * column + 2 * jnp.arange(4)[:, None] + jnp.arange(2)[None, :]
            compat.store(squares_ref, (m, jnp.broadcast_to(block, m.shape)), found, m < count)

    inside = _rows_inside(weight, ends, slot, columns, count)
    shares.add_up_shares(total, inside, shared, (share, block), settings.split, finish)
    pull(pulled, block, programs_of(weight, settings), early=False)
