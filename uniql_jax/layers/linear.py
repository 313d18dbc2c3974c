"""Matrix products with a leaf, whichever way it is held: dense array or packed integers."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dequant_matmul import dequant_matmul
from uniql_jax.int4 import QuantizedArray

Weight = QuantizedArray | Array


def apply_rows(x: Float[Array, "... h"], weight: Weight) -> Float[Array, "..."]:
    """y[..., *lead] = sum_h weight[*lead, h] x[..., h], for a leaf that contracts its last dimension."""
    *lead, width = weight.shape
    if isinstance(weight, QuantizedArray):
        y = dequant_matmul(
            x,
            weight.data.reshape(-1, weight.data.shape[-1]),
            weight.scale.reshape(-1, weight.scale.shape[-1]),
            bits=weight.bits,
            group=weight.group,
            contract="last",
            width=weight.width,
        )
    else:
        y = jnp.matmul(x, weight.reshape(-1, width).T.astype(x.dtype), preferred_element_type=jnp.float32)
    return y.astype(x.dtype).reshape(*x.shape[:-1], *lead)


def apply_columns(x: Float[Array, "..."], weight: Weight) -> Float[Array, "... h"]:
    """y[..., h] = sum over the leading dimensions of x[..., *lead] weight[*lead, h]."""
    *lead, width = weight.shape
    flat = x.reshape(*x.shape[: x.ndim - len(lead)], math.prod(lead))
    if isinstance(weight, QuantizedArray):
        y = dequant_matmul(
            flat, weight.data, weight.scale, bits=weight.bits, group=weight.group, contract="first", width=weight.width
        )
    else:
        y = jnp.matmul(flat, weight.reshape(-1, width).astype(x.dtype), preferred_element_type=jnp.float32)
    return y.astype(x.dtype)
