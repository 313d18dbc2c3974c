"""One token per sequence against a pruned cache in one launch: rotation, cache update, attention over shares of the
slots, and the sum of the shares.

Programs that share a key/value head leave their part in memory; whichever is done last adds the parts up. A count of
those that are done, zero before and after, says which that is, so that no program ever waits for another.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uniql_jax.pallas_kernels import blocks, compat
from uniql_jax.pallas_kernels.ahead import Pull
from uniql_jax.pallas_kernels.attention.caches import integers, scale_of
from uniql_jax.pallas_kernels.compat import pl
from uniql_jax.pallas_kernels.rope.pallas import fast_sine_and_cosine

HEADS = 16
"""Rows of a tensor core's tile: query heads of one key/value head, padded."""
LOWEST = -1e30
"""Score of what is not seen: finite, so that differences are."""


Tile = tuple[Array, Array, tuple[Array, ...], Array]
"""Keys, values, scales of both or none, and which slots are seen."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Slots of a tile, programs that share the slots of one key/value head, and warps of each."""

    tile: int = 64
    split: int = 8
    warps: int = 8


def _dot(a: Array, b: Array) -> Float[Array, "m n"]:
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _largest(x: Array) -> Array:
    """The largest magnitude, axis by axis: JAX 0.12 cannot lower a reduction of several for Triton."""
    x = jnp.abs(x).astype(jnp.float32)
    while x.ndim:
        x = jnp.max(x, axis=-1)
    return x


def _rows(ref: Any, index: tuple[Any, ...], inside: Array, width: int) -> Array:
    """Rows of a cache; without a mask where all of a power of two is there, since a mask costs as much as the load."""
    if inside.size == width:
        return ref[index]
    return compat.load(ref, index, jnp.broadcast_to(inside, jnp.broadcast_shapes(*(jnp.shape(i) for i in index))))


def _sine_and_cosine(angle: Array) -> tuple[Array, Array]:
    if compat.interpreted():
        return jnp.sin(angle), jnp.cos(angle)
    return fast_sine_and_cosine(angle)


def kernel(
    *refs: Any, inputs: tuple[str, ...], outputs: tuple[str, ...], cut: Settings, scale: float, pull: Pull
) -> None:
    """refs: the arrays that `inputs` and `outputs` name; a program takes a share of the slots of one kv head.

    Letters of the shapes: m query head of the kv head, d dimension of keys, r of values, t slot.
    """
    ref = dict(zip(inputs + outputs, refs, strict=True))
    pulled = [ref[name] for name in inputs if name.startswith("coming")]
    groups, width = ref["k_cache"].shape[2:]
    ranks, pair, share = ref["v_cache"].shape[3], ref["q"].shape[2], ref["q"].shape[3] // groups
    turning = pair * ref["q"].shape[1]
    row, group, part = (pl.program_id(axis) for axis in range(3))
    slot = ref["slot"][0]
    start = ref["start"][row] if "start" in ref else jnp.int32(0)
    eight = "k_scale" in ref
    m, d = jnp.arange(HEADS), jnp.arange(max(16, pl.next_power_of_2(width)))
    r = jnp.arange(max(16, pl.next_power_of_2(ranks)))
    m_in, d_in, r_in = m < share, d < width, r < ranks
    dtype = ref["q"].dtype

    def vectors(name: str, head: Array, inside: Array) -> Array:
        """Rotated vectors of some heads of "q" or "k": [heads, d], in the projections' dtype."""
        lanes, index = d[None, :], head[:, None]
        turns, at = inside[:, None] & (lanes < turning), (row, lanes // pair, lanes % pair, index)
        x = compat.load(ref[name], at, turns).astype(jnp.float32)
        if "inv_freq" in ref:
            other = (row, lanes // pair, 1 - lanes % pair, index)
            other = compat.load(ref[name], other, turns).astype(jnp.float32)
            frequency = compat.load(ref["inv_freq"], (d // pair, group), d < turning)
            sine, cosine = _sine_and_cosine((slot - start).astype(jnp.float32) * frequency)
            x = x * cosine[None, :] + other * jnp.where(d % pair == 0, -sine, sine)[None, :]
        if f"{name}_pass" in ref:
            passed = inside[:, None] & (lanes >= turning) & (lanes < width)
            x = x + compat.load(ref[f"{name}_pass"], (row, lanes - turning, index), passed).astype(jnp.float32)
        return x.astype(dtype)

    # A part takes every split-th tile from the first that holds a token on. Where no row is padded that is known, and
    # on its way, before the slot is.
    first = start // cut.tile
    tiles = pl.cdiv(slot, cut.tile) - first
    slots = ref["k_cache"].shape[1]

    def load(index: Array) -> Tile:
        """Keys, values, their scales if any, and who is seen, of a tile."""
        t = (first + index) * cut.tile + jnp.arange(cut.tile)
        held = jnp.minimum(t, slots - 1)
        k = _rows(ref["k_cache"], (row, held[None, :], group, d[:, None]), d_in[:, None], width)
        v = _rows(ref["v_cache"], (row, held[:, None], group, r[None, :]), r_in[None, :], ranks)
        scales = tuple(ref[f"{name}_scale"][row, held, group].astype(jnp.float32) for name in "kv" if eight)
        return k, v, scales, (t >= start) & (t < slot)

    held = load(part)  # first of all, so that it is on its way while the new token is turned
    q = vectors("q", group * share + m, m_in)
    one = jnp.zeros((1,), jnp.int32) + group
    new_k = vectors("k", one, one >= 0)
    new_v = compat.load(ref["v"], (row, r, group), r_in)
    new_scales: tuple[Any, ...] = ()
    if eight:
        new_scales = tuple(scale_of(_largest(x)) for x in (new_k, new_v))
        new_k, new_v = (integers(x, of_x) for x, of_x in zip((new_k, new_v), new_scales, strict=True))
    new_k, new_v = new_k.astype(ref["k_cache"].dtype), new_v.astype(ref["v_cache"].dtype)
    # What this program needs itself is on its way by now.
    program, programs = (row * groups + group) * cut.split + part, ref["k_cache"].shape[0] * groups * cut.split
    pull(pulled, program, programs, early=True)

    def add(carry: tuple[Array, Array, Array], tile: Tile) -> tuple[Array, Array, Array]:
        top, total, found = carry
        k, v, scales, seen = tile
        scores = _dot(q, k.astype(dtype)) * scale
        if eight:
            scores = scores * scales[0][None, :]
        scores = jnp.where(seen[None, :], scores, LOWEST)
        higher = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.where(seen[None, :], jnp.exp(scores - higher[:, None]), 0.0)
        fade = jnp.exp(top - higher)
        v = jnp.where(seen[:, None], v, jnp.zeros((), v.dtype))  # nobody knows what lies where no token is
        shares = weights
        if eight:
            shares = weights * jnp.where(seen, scales[1], 0.0)[None, :]
        found = found * fade[:, None] + _dot(shares.astype(dtype), v.astype(dtype))
        return higher, total * fade + jnp.sum(weights, axis=1), found

    # The first part begins with the new token, the others with nothing.
    score = jnp.sum(q.astype(jnp.float32) * new_k.astype(dtype).astype(jnp.float32), axis=1) * scale
    value = new_v.astype(dtype).astype(jnp.float32)
    if eight:
        score, value = score * new_scales[0].astype(jnp.float32), value * new_scales[1].astype(jnp.float32)
    mine = (part == 0).astype(jnp.float32)
    begin = score * mine + LOWEST * (1 - mine), jnp.zeros((HEADS,), jnp.float32) + mine
    found = jnp.zeros((HEADS, 1), jnp.float32) + (mine * value)[None, :]
    # The first tile is apart from the loop: what passes from turn to turn takes a register for each 16-bit number.
    carry = add((*begin, found), held)
    rounds = pl.cdiv(tiles - part, cut.split)
    top, total, found = jax.lax.fori_loop(1, rounds, lambda i, carry: add(carry, load(part + i * cut.split)), carry)

    @pl.when(part == 0)
    def _() -> None:
        # The sum over the one row that there is.
        compat.store(ref["k_after"], (row, slot, group, d), new_k.astype(jnp.float32).sum(axis=0), d_in)
        compat.store(ref["v_after"], (row, slot, group, r), new_v, r_in)
        for name, of_x in zip("kv", new_scales, strict=False):
            ref[f"{name}_scale_after"][row, slot, group] = of_x

    pull(pulled, program, programs, early=False)

    def put(head: Array, total: Array, found: Array) -> None:
        out = found / jnp.where(total > 0, total, 1.0)[:, None]
        heads, inside = groups * share, (head < share)[:, None] & r_in[None, :]
        # What is masked lies outside: the interpreter writes masked places back, and they must be nobody's.
        at = jnp.where(inside, r[None, :] * heads + group * share + head[:, None], ranks * heads)
        compat.store(ref["out"], blocks.index(ref["out"], row, at), out, inside)

    if cut.split == 1:
        put(m, total, found)
        return
    compat.store(ref["parts"], (row, group, part, m[:, None], r[None, :]), found, m_in[:, None] & r_in[None, :])
    compat.store(ref["tops"], (row, group, part, m), top, m_in)
    compat.store(ref["totals"], (row, group, part, m), total, m_in)
    done = compat.count(ref["done_after"], (row, group))

    @pl.when(done == cut.split - 1)
    def _() -> None:
        few = jnp.arange(pl.next_power_of_2(share))
        few_in = few < share
        inside = few_in[:, None] & r_in[None, :]
        # Unrolled, and loaded before anything is computed, so that no load waits for another.
        held = []
        for i in range(cut.split):
            its_top, its_total = (compat.load(ref[n], (row, group, i, few), few_in) for n in ("tops", "totals"))
            its = compat.load(ref["parts"], (row, group, i, few[:, None], r[None, :]), inside)
            held.append((its_top, its_total, its))
        top = functools.reduce(jnp.maximum, (its_top for its_top, _, _ in held))
        total, found = jnp.zeros(few.shape, jnp.float32), jnp.zeros((few.shape[0], r.shape[0]), jnp.float32)
        for its_top, its_total, its in held:
            gain = jnp.exp(its_top - top)
            total, found = total + its_total * gain, found + its * gain[:, None]
        put(few, total, found)
        ref["done_after"][row, group] = jnp.int32(0)
