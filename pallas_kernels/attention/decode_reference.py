"""One token per sequence against a cache, in plain jnp: the specification, and what runs wherever no kernel does."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels.attention.caches import Caches as Caches
from uniql_jax.pallas_kernels.attention.caches import dequantize, quantize
from uniql_jax.pallas_kernels.attention.reference import multiplied
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


class Place(NamedTuple):
    """Where the new tokens stand: each sequence's first slot that holds a token (None: 0 for all), and the slot where
    the new tokens go, the same for all. A sequence sees the slots from its first to the new one.
    """

    start: Int[Array, " b"] | None
    slot: Int[Array, ""]

    def positions(self, batch: int) -> Int[Array, " b"]:
        """Each sequence's own count of earlier tokens."""
        return jnp.broadcast_to(self.slot if self.start is None else self.slot - self.start, (batch,))


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
        turned = rope.rope_qk(q[:, None], k[:, None], place.positions(q.shape[0])[:, None], inv_freq)
        q, k = turned[0][:, 0], turned[1][:, 0]
    q, k, v = keys(q, token.q_pass), keys(k, token.k_pass), token.v.swapaxes(1, 2)
    caches = written(caches, k[:, None], v[:, None], place.slot)
    out = attend(q, caches, place, scale)
    return out, caches


def written(
    caches: Caches, k: Float[Array, "b t g dk"], v: Float[Array, "b t g dv"], slot: Int[Array, ""] | int
) -> Caches:
    """The caches with the keys and values of new tokens from a slot on, in whatever type they are held."""

    def put(whole: Array, part: Array) -> Array:
        start = (0, slot, *(0,) * (whole.ndim - 2))
        return jax.lax.dynamic_update_slice(whole, part.astype(whole.dtype), start)

    if caches.k_scale is None or caches.v_scale is None:
        return Caches(put(caches.k, k), put(caches.v, v))
    (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
    return Caches(put(caches.k, k), put(caches.v, v), put(caches.k_scale, k_scale), put(caches.v_scale, v_scale))


def attend(q: Float[Array, "b n dk"], caches: Caches, place: Place, scale: float) -> Float[Array, "b vo n"]:
    """Softmax attention of one query per head over the slots that it sees, all scores at once."""
    groups, slots = caches.k.shape[2], jnp.arange(caches.k.shape[1])
    wide = multiplied(q.dtype)
    keys = dequantize(caches.k, caches.k_scale, q.dtype).astype(wide)
    values = dequantize(caches.v, caches.v_scale, q.dtype).astype(wide)
    seen = (slots <= place.slot)[None]
    if place.start is not None:
        seen = seen & (slots[None] >= place.start[:, None])
    split = q.reshape(q.shape[0], groups, q.shape[1] // groups, -1)
    scores = jnp.einsum("bgmd,bsgd->bgms", split.astype(wide), keys, preferred_element_type=jnp.float32)
    scores = jnp.where(seen[:, None, None, :], scores * scale, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    values = jnp.where(seen[:, :, None, None], values, 0)  # nobody knows what lies where no token is
    out = jnp.einsum("bgms,bsgr->brgm", weights.astype(wide), values, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(q.shape[0], out.shape[1], -1)
