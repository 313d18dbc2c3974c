"""Attention of new tokens to a cache that holds them already, in XLA: one tile of slots after another.

Tiles that hold no token of any row, before the first or behind the last, are not read; scores of one tile are held at a
time, so that memory does not grow with the cache.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels.attention import reference
from uniql_jax.pallas_kernels.attention.caches import Caches, dequantize

TILE = 256
"""Slots that are read at a time."""
LOWEST = -1e30
"""Score of what is not seen: finite, so that differences are."""

Carry = tuple[Float[Array, "b g m t"], Float[Array, "b g m t"], Float[Array, "b g m t dv"]]


def cached_attention(
    q: Float[Array, "b t n dk"],
    caches: Caches,
    start: Int[Array, " b"] | None,
    slot: Int[Array, ""] | int,
    *,
    scale: float | int,
) -> Float[Array, "b t n dv"]:
    """See prefill.cached_attention."""
    batch, _, heads, _ = q.shape
    tile = min(TILE, caches.k.shape[1])
    most = max(1, reference.SCORES.get(jax.default_backend(), 2**26) // max(1, batch * heads * tile))

    def block(first: Int[Array, ""] | int, part: Float[Array, "b s n dk"]) -> Float[Array, "b s n dv"]:
        return _block(part, caches, start, slot + first, float(scale), tile)

    return reference.in_blocks(q, most, block)


def _block(
    q: Float[Array, "b t n dk"],
    caches: Caches,
    start: Int[Array, " b"] | None,
    slot: Int[Array, ""] | int,
    scale: float,
    tile: int,
) -> Float[Array, "b t n dv"]:
    """Queries whose tokens lie in the slots from `slot` on, with a running maximum and sum."""
    batch, length, heads, _ = q.shape
    slots, groups = caches.k.shape[1:3]
    split = q.reshape(batch, length, groups, heads // groups, -1)
    own = slot + jnp.arange(length)
    wide = reference.multiplied(q.dtype)

    def add(index: Int[Array, ""] | int, carry: Carry) -> Carry:
        top, total, found = carry
        begin = jnp.minimum(index * tile, slots - tile)  # the last tile begins early enough to be whole
        part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, begin, tile, axis=1), caches)
        place = begin + jnp.arange(tile)
        real = (place >= index * tile)[None]
        if start is not None:
            real = real & (place[None] >= start[:, None])
        seen = (real[:, None] & (place[None, None] <= own[None, :, None]))[:, None, None]
        k = dequantize(part.k, part.k_scale, q.dtype).astype(wide)
        scores = jnp.einsum("btgmd,bsgd->bgmts", split.astype(wide), k, preferred_element_type=jnp.float32)
        scores = jnp.where(seen, scores * scale, LOWEST)
        higher = jnp.maximum(top, scores.max(axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - higher[..., None]), 0.0)
        fade = jnp.exp(top - higher)
        # Nobody knows what lies where no token is.
        real = (real & (place <= own[-1])[None])[:, :, None, None]
        v = jnp.where(real, dequantize(part.v, part.v_scale, q.dtype), 0).astype(wide)
        more = jnp.einsum(
            "bgmts,bsgr->bgmtr", weights.astype(q.dtype).astype(wide), v, preferred_element_type=jnp.float32
        )
        return higher, total * fade + weights.sum(axis=-1), found * fade[..., None] + more

    shape = (batch, groups, heads // groups, length)
    carry = jnp.full(shape, LOWEST), jnp.zeros(shape), jnp.zeros((*shape, caches.v.shape[3]))
    if tile == slots:
        carry = add(0, carry)
    else:
        first = 0 if start is None else jnp.min(start) // tile
        carry = jax.lax.fori_loop(first, own[-1] // tile + 1, add, carry)
    _, total, found = carry
    out = found / jnp.where(total > 0, total, 1.0)[..., None]
    return jnp.moveaxis(out, 3, 1).reshape(batch, length, heads, -1).astype(q.dtype)
