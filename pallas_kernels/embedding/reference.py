"""Gather packed rows, then dequantize only those: the specification, and what runs wherever no kernel does."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels import packing


def embed(
    tokens: Int[Array, "*lead"],
    data: Int[Array, "vocab stored"],
    scale: Float[Array, "vocab groups"],
    *,
    bits: int,
    group: int,
    width: int,
    dtype: jnp.dtype,
) -> Float[Array, "*lead width"]:
    """See api.embed."""
    rows, scales = jnp.take(data, tokens, axis=0, mode="clip"), jnp.take(scale, tokens, axis=0, mode="clip")
    return packing.dequantize_last(rows, scales, bits=bits, group=group, width=width).astype(dtype)
