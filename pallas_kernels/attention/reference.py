"""Attention in plain jnp: the specification, and what runs wherever no kernel does.

Many scores are made in blocks of queries, one after another. A block sees all its keys, so that it needs no running
maximum and sum and is the same function as the whole; a gradient makes the block's scores again.
"""

from __future__ import annotations

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
    """All scores at once. A query that sees nothing gets zeros."""
    batch, length, heads, _ = q.shape
    grouped = q.reshape(batch, length, k.shape[2], heads // k.shape[2], -1)
    scores = jnp.einsum("btgmd,bsgd->bgmts", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores * scale, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = (weights / jnp.where(total > 0, total, 1.0)).astype(v.dtype)
    out = jnp.einsum("bgmts,bsgr->btgmr", weights, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(batch, length, heads, v.shape[-1])


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
    most = max(1, SCORES.get(jax.default_backend(), 2**26) // max(1, batch * heads * length))

    def block(first: Int[Array, ""] | int, part: Float[Array, "b s n dk"]) -> Float[Array, "b s n dv"]:
        place = first + jnp.arange(part.shape[1])
        before = jnp.arange(length)[None, :] <= place[:, None]
        return plain(part, k, v, before[None] & real[:, None, :] & real[:, place][:, :, None], scale)

    return in_blocks(q, most, block if length <= most else jax.checkpoint(block))
