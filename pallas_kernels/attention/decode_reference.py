"""One token per sequence against a cache, in plain jnp: the specification, and what runs wherever no kernel does."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from uniql_jax.pallas_kernels.rope import reference as rope


class Token(NamedTuple):
    """What the projections give for one new token of every sequence, before its rotation.

    q and k hold pairs of dimensions that rotate (or single ones, `pair` 1, where nothing does), q_pass and k_pass, if
    any, dimensions that a partial rotary embedding leaves as they are; head i of n belongs to key/value head
    i // (n // g).
    """

    q: Float[Array, "b qk pair n"]
    k: Float[Array, "b qk pair g"]
    v: Float[Array, "b vo g"]
    q_pass: Float[Array, "b dp n"] | None = None
    k_pass: Float[Array, "b dp g"] | None = None


class Caches(NamedTuple):
    """Keys (rotated; dimensions of pairs interleaved, then those passed through) and values of all slots."""

    k: Float[Array, "b slots g dk"]
    v: Float[Array, "b slots g dv"]


class Place(NamedTuple):
    """Where the new tokens stand: each sequence's own position, the slots that it sees (1; the new one with them, none
    after it), and the slot where the token goes, the same for all.
    """

    positions: Int[Array, " b"]
    visible: Bool[Array, "b slots"] | Int[Array, "b slots"]
    slot: Int[Array, ""]


def keys(turned: Float[Array, "b qk pair n"], passed: Float[Array, "b dp n"] | None) -> Float[Array, "b n dk"]:
    """Rotated pairs and passed dimensions as the vectors that the cache holds."""
    flat = turned.reshape(turned.shape[0], -1, turned.shape[-1])
    return (flat if passed is None else jnp.concatenate([flat, passed], axis=1)).swapaxes(1, 2)


def decode(
    token: Token,
    caches: Caches,
    inv_freq: Float[Array, "qk g"] | None,
    place: Place,
    *,
    scale: float,
) -> tuple[Float[Array, "b vo n"], Caches]:
    """See decode.decode."""
    q, k = token.q, token.k
    if inv_freq is not None:
        turned = rope.rope_qk(q[:, None], k[:, None], place.positions[:, None], inv_freq)
        q, k = turned[0][:, 0], turned[1][:, 0]
    q, k, v = keys(q, token.q_pass), keys(k, token.k_pass), token.v.swapaxes(1, 2)
    start = (0, place.slot, 0, 0)
    caches = Caches(
        jax.lax.dynamic_update_slice(caches.k, k[:, None].astype(caches.k.dtype), start),
        jax.lax.dynamic_update_slice(caches.v, v[:, None].astype(caches.v.dtype), start),
    )
    groups = caches.k.shape[2]
    split = q.reshape(q.shape[0], groups, q.shape[1] // groups, -1)
    scores = jnp.einsum("bgmd,bsgd->bgms", split, caches.k.astype(q.dtype), preferred_element_type=jnp.float32)
    scores = jnp.where(place.visible[:, None, None, :] != 0, scores * scale, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = (weights / jnp.where(total > 0, total, 1.0)).astype(q.dtype)
    out = jnp.einsum("bgms,bsgr->brgm", weights, caches.v.astype(q.dtype), preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(q.shape[0], out.shape[1], -1), caches
