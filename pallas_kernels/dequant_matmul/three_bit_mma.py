"""Up to 16 rows of x times a 3-bit weight: mma.py's product for the tiles of three_bit.py.

A field of 3 bits at the foot of a bf16 is that multiple of its least number, 2**-133, and so it is up to five places
higher: below twice the least normal number all are evenly spaced. One `and` thus yields a pair of numbers, and one fma
both centres and scales it to (h - 3.75) * 2**-LIFT. Two of a word's five fields are where they can be read; two shifts
serve the other three, and leave the spare bits of three words next to one another.
"""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels import compat
from uniql_jax.pallas_kernels.compat import pl
from uniql_jax.pallas_kernels.dequant_matmul import mma, three_bit, warp
from uniql_jax.pallas_kernels.dequant_matmul.fragments import load_x
from uniql_jax.pallas_kernels.dequant_matmul.mma import Settings, Source
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight
from uniql_jax.pallas_kernels.dequant_matmul.warp import Operand, Threads

LIFT = 32
"""Binary orders of magnitude by which unpacked weights are too small, and sums must be lifted."""
SHIFTS = (10, 11, 12)
"""By which the last field of a word reaches its place: another for each word, so that the spare bits end up side by
side, the highest one of the first word five places up."""
MIDDLE = 6
"""The same of the two fields before it."""


def unpack(words: Sequence[Int[Array, "threads 4"]], mask: Array | None) -> list[Int[Array, "threads 4"]]:
    """Three words of every thread as sixteen pairs of bf16, (h - 3.75) * 2**-LIFT; `mask`: all ones that come late."""
    if compat.interpreted():
        halves = [(pair & 7, (pair >> 16) & 7) for pair in three_bit.pairs_of(list(words))]
        lift, centre = 2.0**-LIFT, three_bit.CENTRE
        return [warp.join(*((h.astype(jnp.float32) - centre) * lift for h in pair)) for pair in halves]
    found, spare = [], []
    for word, shift in zip(words, SHIFTS, strict=True):
        middle, last = (jax.lax.shift_right_logical(word, jnp.int32(by)) for by in (MIDDLE, shift))
        found += [_number([each], at, mask) for each, at in ((word, 0), (word, 3), (middle, 0), (middle, 3))]
        found.append(_number([last], 3 * 4 - shift, mask))
        spare.append(last)
    return [*found, _number(spare, 3, mask)]


def _number(words: Sequence[Array], at: int, mask: Array | None) -> Int[Array, "threads 4"]:
    """A field from its place to a number: from one word, or a bit each from three, the highest first."""
    masks = [0x00070007 << at] if len(words) == 1 else [0x00010001 << (at + 2 - i) for i in range(3)]
    gated = mask is not None
    # and, and-or and and-and are one lop3 each here; as jnp operations they become two.
    lines = ["{ .reg .b32 w, m, f, c;", f"mov.b32 m, {masks[0]};"]
    lines.append(f"lop3.b32 w, $1, m, ${len(words) + 1}, 0x80;" if gated else "and.b32 w, $1, m;")
    for i in range(1, len(words)):
        lines.append(f"mov.b32 m, {masks[i]}; lop3.b32 w, ${i + 1}, m, w, 0xEA;")
    factor = _bits(2.0 ** (133 - LIFT - at))
    centre = _bits(-three_bit.CENTRE * 2.0**-LIFT)
    lines.append(f"mov.b32 f, {factor}; mov.b32 c, {centre}; fma.rn.bf16x2 $0, w, f, c; }}")
    args = [*words, *([mask] if gated else [])]
    return warp.asm(" ".join(lines), ",".join(["=r", *"rrrr"[: len(args)]]), args, jnp.int32, 1)


def _bits(number: float) -> int:
    """A number that bf16 holds exactly, twice."""
    [half] = struct.unpack(">H", struct.pack(">f", number)[:2])
    return half << 16 | half


def _words(source: Source, weight: Weight, at: Threads, pair: Array, settings: Settings) -> list[Array]:
    """The words of two groups that a thread feeds: three tensors [threads, 2 * half of the rows + group]."""
    major = (source.tile, pair) if weight.layout == "rows" else (pair, source.tile)
    places = [(*major, word, 4 * at.row + at.lane, at.element) for word in range(three_bit.WORDS)]
    return [compat.stream(source.data, place) if settings.stream else source.data[place] for place in places]


def _product(
    pairs: Sequence[Array], x: list[list[Operand]], group: int, zeros: Float[Array, "threads 4"]
) -> Float[Array, "threads 4"]:
    """A row tile times one of its groups."""
    total = zeros
    for first in (0, 2):  # half of the contraction at a time: an instruction that takes all pairs has too many operands
        steps: list[tuple[Sequence[Operand], Operand]] = []
        for i in (first, first + 1):
            for half, b in enumerate(x[i]):
                even, odd = pairs[4 * i + 2 * half], pairs[4 * i + 2 * half + 1]
                steps.append((((even, group), (even, 2 + group), (odd, group), (odd, 2 + group)), b))
        total = warp.multiply(steps, total)
    return total


def steps(weight: Weight) -> int:
    """Pairs of groups that warps take in turn."""
    return pl.cdiv(weight.groups, three_bit.SPAN)


def accumulate(
    x_ref: Any,
    sources: Sequence[Source],
    weight: Weight,
    settings: Settings,
    at: Threads,
    columns: int,
    share: Any = 0,
    first: int = 0,
) -> list[Float[Array, "threads 4"]]:
    """As mma.accumulate, for a 3-bit weight whose contraction begins with x's group number `first`."""
    threads, pairs = at.row.shape[0], steps(weight)
    batch = max(1, settings.batch // three_bit.SPAN)
    stride = settings.along_k * batch
    rounds = pl.cdiv(pairs, stride * settings.split)
    repeats = rounds * stride * settings.split != pairs
    zeros = jnp.zeros((threads, 4), jnp.float32)

    def step(index: Array, sums: Sequence[Array]) -> list[Array]:
        start = (index * settings.split + share) * stride + at.warp_k
        numbers, sums = [start + u * settings.along_k for u in range(batch)], list(sums)
        held = [jnp.minimum(pair, pairs - 1) if repeats else pair for pair in numbers]
        words = [[_words(source, weight, at, pair, settings) for source in sources] for pair in held]
        groups = [[three_bit.SPAN * pair + g for g in range(three_bit.SPAN)] for pair in held]
        if weight.groups % three_bit.SPAN:
            groups = [[jnp.minimum(group, weight.groups - 1) for group in each] for each in groups]
        scales = [[[mma.scales_of(s, weight, at, g)[0] for s in sources] for g in each] for each in groups]
        mask = warp.gate(index, threads, -1) if settings.gate else None
        for u, pair in enumerate(numbers):
            unpacked = [unpack(each, mask) for each in words[u]]
            for g, group in enumerate(groups[u]):
                # x, which the first-level cache has, is loaded here: it would hold many registers all the while.
                xs = [load_x(x_ref, weight, at, group + first, column) for column in range(columns)]
                for slot, (r, column) in enumerate(itertools.product(range(len(sources)), range(columns))):
                    product = _product(unpacked[r], xs[column], g, zeros)
                    if repeats or (g and weight.groups % three_bit.SPAN):
                        # What is repeated must add nothing, not even 0 * inf.
                        product = jnp.where(three_bit.SPAN * pair + g < weight.groups, product, 0.0)
                    sums[slot] = sums[slot] + product * scales[u][g][r]
        return sums

    sums = jax.lax.fori_loop(0, rounds, step, [zeros] * (len(sources) * columns))
    return [total * 2.0**LIFT for total in sums]


product = functools.partial(mma.product, accumulate=accumulate)
"""mma.product for 3 bits."""
