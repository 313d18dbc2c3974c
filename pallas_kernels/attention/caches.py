"""Keys and values of a cache, in the model's float type or in 8 bits with a scale per head and token."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

LARGEST = 127.0
"""Of the symmetric 8-bit grid."""


class Caches(NamedTuple):
    """Keys (rotated; dimensions of pairs interleaved, then those passed through) and values of all slots.

    int8 keys and values have scales; a slice of the last axis keeps them, so that pruning still keeps a prefix.
    """

    k: Float[Array, "b slots g dk"] | Int[Array, "b slots g dk"]
    v: Float[Array, "b slots g dv"] | Int[Array, "b slots g dv"]
    k_scale: Float[Array, "b slots g"] | None = None
    v_scale: Float[Array, "b slots g"] | None = None


def scale_of(largest: Float[Array, "..."]) -> Float[Array, "..."]:
    """The scale of numbers up to `largest`, bfloat16."""
    return (largest.astype(jnp.float32) / LARGEST).astype(jnp.bfloat16)


def integers(x: Float[Array, "..."], scale: Float[Array, "..."]) -> Int[Array, "..."]:
    """Numbers over a scale that broadcasts to them, rounded to int8; of a scale of 0, zeros."""
    wide = scale.astype(jnp.float32)
    inverse = jnp.where(wide > 0, 1.0 / jnp.where(wide > 0, wide, 1.0), 0.0)
    rounded = jnp.floor(x.astype(jnp.float32) * inverse + 0.5)  # as kernels do, which cannot round to even
    return jnp.clip(rounded, -LARGEST, LARGEST).astype(jnp.int8)


def quantize(x: Float[Array, "*lead d"]) -> tuple[Int[Array, "*lead d"], Float[Array, "*lead"]]:
    """Vectors as int8 and a scale each."""
    largest = jnp.max(jnp.abs(x), axis=-1, initial=0.0).astype(jnp.float32)
    # XLA leaves a conversion to bfloat16 and back out for GPUs: integers would be of a scale that is not stored.
    scale = jax.lax.reduce_precision(largest / LARGEST, exponent_bits=8, mantissa_bits=7)
    return integers(x, scale[..., None]), scale.astype(jnp.bfloat16)


def dequantize(
    x: Float[Array, "*lead d"] | Int[Array, "*lead d"], scale: Float[Array, "*lead"] | None, dtype: DTypeLike
) -> Float[Array, "*lead d"]:
    """Vectors of a cache in `dtype`."""
    if scale is None:
        return x.astype(dtype)
    return (x.astype(jnp.float32) * scale.astype(jnp.float32)[..., None]).astype(dtype)
