"""Attention in plain jnp: the specification, and what runs wherever no kernel does.

Many scores are made in blocks of queries, one after another, on CPUs of few sequences at a time. A block sees all its
keys, so that it needs no running maximum and sum and is the same function as the whole; a gradient makes the block's
scores again.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

SCORES = {"cpu": 2**21, "gpu": 2**26}
"""Most float32 scores that are held at a time: what a CPU's cache holds, 256 MiB of a GPU's memory."""


def multiplied(dtype: DTypeLike) -> DTypeLike:
    """The type in which attention multiplies: XLA lacks some products of 16-bit floats on CPUs, and none is faster."""
    return jnp.float32 if jax.default_backend() == "cpu" else dtype


def plain(
    q: Float[Array, "b t n dk"],
    k: Float[Array, "b s g dk"],
    v: Float[Array, "b s g dv"],
    visible: Bool[Array, "b t s"],
    scale: float | int,
) -> Float[Array, "b t n dv"]:
    """All scores at once. A query that sees nothing gets zeros.

    Both products are plain batches of matrices, one for each key/value head of each sequence: XLA's fast products on
    CPUs take these alone, and want batches first and operands in the order of memory.
    """
    batch, length, heads, _ = q.shape
    slots, groups = k.shape[1:3]

    def matrices(x: Float[Array, "b s g d"]) -> Float[Array, "bg s d"]:
        return x.swapaxes(1, 2).reshape(batch * groups, slots, x.shape[3])

    grouped = q.reshape(batch, length, groups, heads // groups, q.shape[3]).transpose(0, 2, 3, 1, 4)
    rows = grouped.reshape(batch * groups, heads // groups * length, q.shape[3])
    scores = jnp.einsum("nqd,nsd->nqs", rows, matrices(k), preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, groups, heads // groups, length, slots)
    scores = jnp.where(visible[:, None, None], scores * scale, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = (weights / jnp.where(total > 0, total, 1.0)).astype(v.dtype).reshape(*rows.shape[:2], slots)
    out = jnp.einsum("nqs,nsr->nqr", weights, matrices(v), preferred_element_type=jnp.float32).astype(q.dtype)
    out = out.reshape(batch, groups, heads // groups, length, v.shape[3]).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads, v.shape[3])


def in_blocks(
    q: Float[Array, "b t n dk"],
    most: int,
    block: Callable[[Int[Array, ""] | int, Float[Array, "b s n dk"]], Float[Array, "b s n dv"]],
) -> Float[Array, "b t n dv"]:
    """block(first, queries from there on) for at most `most` queries at a time, joined."""
    batch, length, heads, _ = q.shape
    if length <= most:
        return block(0, q)
    blocks = -(-length // most)
    size = -(-length // blocks)

    def cut(first: Int[Array, ""]) -> Float[Array, "b s n dv"]:
        # The last block starts early enough to be whole: what it does twice is cut off below.
        return block(first, jax.lax.dynamic_slice_in_dim(q, first, size, axis=1))

    whole = length // size
    out = jax.lax.map(cut, jnp.arange(whole) * size).swapaxes(0, 1).reshape(batch, whole * size, heads, -1)
    rest = length - whole * size
    if rest:
        out = jnp.concatenate([out, cut(jnp.asarray(length - size))[:, size - rest :]], axis=1)
    return out


def causal_attention(
    q: Float[Array, "b t n dk"],
    k: Float[Array, "b t g dk"],
    v: Float[Array, "b t g dv"],
    valid: Bool[Array, "b t"] | None = None,
    *,
    scale: float | int,
) -> Float[Array, "b t n dv"]:
    """See prefill.causal_attention."""
    batch, length, heads, _ = q.shape
    real = jnp.ones((batch, length), bool) if valid is None else valid
    held = SCORES.get(jax.default_backend(), 2**26)
    # A CPU takes sequence after sequence, as far as they do not fit its cache together.
    rows = math.gcd(batch, 2 ** (max(1, held // max(1, heads * length**2)).bit_length() - 1))
    rows = rows if jax.default_backend() == "cpu" else batch
    most = max(1, held // max(1, rows * heads * length))

    def sequences(parts: tuple[Array, Array, Array, Array]) -> Array:
        q, k, v, real = parts

        def block(first: Int[Array, ""] | int, part: Float[Array, "b s n dk"]) -> Float[Array, "b s n dv"]:
            place = first + jnp.arange(part.shape[1])
            before = jnp.arange(length)[None, :] <= place[:, None]
            return plain(part, k, v, before[None] & real[:, None, :] & real[:, place][:, :, None], scale)

        return in_blocks(q, most, block if rows == batch and length <= most else jax.checkpoint(block))

    if rows == batch:
        return sequences((q, k, v, real))
    pieces = jax.tree.map(lambda x: x.reshape(batch // rows, rows, *x.shape[1:]), (q, k, v, real))
    return jax.lax.map(sequences, pieces).reshape(batch, length, heads, v.shape[3])
