"""Rotation of pairs in float32: the specification, and what runs wherever no kernel does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rope(
    x: Float[Array, "batch length pairs 2 heads"],
    positions: Int[Array, "batch length"],
    inv_freq: Float[Array, "pairs kv_heads"],
) -> Float[Array, "batch length pairs 2 heads"]:
    """See api.rope."""
    kv_heads = inv_freq.shape[1]
    # The frequencies are data, not parameters: an optimizer that reaches them must find no gradient.
    inv_freq = jax.lax.stop_gradient(inv_freq)
    angle = positions.astype(jnp.float32)[..., None, None] * inv_freq.astype(jnp.float32)
    cos, sin = jnp.cos(angle)[..., None], jnp.sin(angle)[..., None]
    split = x.astype(jnp.float32).reshape(*x.shape[:-1], kv_heads, x.shape[-1] // kv_heads)
    first, second = split[..., 0, :, :], split[..., 1, :, :]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=3)
    return turned.reshape(x.shape).astype(x.dtype)


def rope_qk(
    q: Float[Array, "batch length pairs 2 heads"],
    k: Float[Array, "batch length pairs 2 kv_heads"],
    positions: Int[Array, "batch length"],
    inv_freq: Float[Array, "pairs kv_heads"],
) -> tuple[Float[Array, "batch length pairs 2 heads"], Float[Array, "batch length pairs 2 kv_heads"]]:
    """See api.rope_qk."""
    return rope(q, positions, inv_freq), rope(k, positions, inv_freq)
