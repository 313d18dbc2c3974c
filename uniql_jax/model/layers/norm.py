"""RMS normalization."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "... h"], weight: Float[Array, " h"], eps: float) -> Float[Array, "... h"]:
    """x / rms(x) * weight over the last dimension; statistics in float32, result in x's dtype."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight.astype(x.dtype)


def head_norm(
    x: Float[Array, "b t p w n"], gain: Float[Array, "p w n"], size: int, eps: float
) -> Float[Array, "b t p w n"]:
    """`rms_norm` of every head over its pairs [p, w]: the mean is one over `size` entries, what was cut being zero."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.sum(wide * wide, axis=(2, 3), keepdims=True) / size + eps)
    return (wide * scale).astype(x.dtype) * gain.astype(x.dtype)
