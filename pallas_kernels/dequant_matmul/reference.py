"""Dequantize, then one dot with float32 accumulation: the specification, and what runs wherever no kernel does."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import packing


def dequant_matmul(
    x: Float[Array, "*lead width"],
    data: Int[Array, "a b"],
    scale: Float[Array, "c d"],
    *,
    bits: int,
    group: int,
    contract: str,
    width: int,
) -> Float[Array, "*lead out"]:
    """See api.dequant_matmul."""
    if contract == "last":
        weight = packing.dequantize_last(data, scale, bits=bits, group=group, width=width)
        product = jnp.einsum("...w,rw->...r", x.astype(jnp.float32), weight, preferred_element_type=jnp.float32)
    else:
        weight = packing.dequantize_first(data, scale, bits=bits, group=group, width=width)
        product = jnp.einsum("...w,wf->...f", x.astype(jnp.float32), weight, preferred_element_type=jnp.float32)
    return product.astype(x.dtype)
