"""Dequantize, then one dot with float32 accumulation: the specification, and what runs wherever no kernel does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels import packing
from uniql_jax.pallas_kernels.dequant_matmul import three_bit, tiling


def dequant_matmul(
    x: Float[Array, "*lead width"],
    data: Int[Array, "..."],
    scale: Float[Array, "c d"],
    *,
    bits: int,
    group: int,
    contract: str,
    width: int,
    layout: str = "plain",
) -> Float[Array, "*lead out"]:
    """See api.dequant_matmul."""
    if bits == three_bit.BITS:
        return _three_bit(x, data, scale, contract=contract, width=width)
    data = tiling.plain(data, layout, scale.shape[0 if contract == "last" else 1])
    # Full float32 where the caller's numbers are: a GPU's default would be TF32.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    x32 = x.astype(jnp.float32)
    if contract == "last":
        weight = packing.dequantize_last(data, scale, bits=bits, group=group, width=width)
        return jnp.einsum("...w,rw->...r", x32, weight, precision=precision).astype(x.dtype)
    weight = packing.dequantize_first(data, scale, bits=bits, group=group, width=width)
    return jnp.einsum("...w,wf->...f", x32, weight, precision=precision).astype(x.dtype)


def _three_bit(
    x: Float[Array, "*lead width"], data: Int[Array, "..."], scale: Float[Array, "c d"], *, contract: str, width: int
) -> Float[Array, "*lead out"]:
    """The same for tiles of 3 bits."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    weight = three_bit.dequantize(data, scale, contract)[:, :width]
    return jnp.einsum("...w,rw->...r", x.astype(jnp.float32), weight, precision=precision).astype(x.dtype)
