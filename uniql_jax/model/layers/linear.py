"""Matrix products with a leaf, whichever way it is held: dense array, packed integers, dense with a LoRA beside, or
rounded while it trains.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from uniql_jax.pallas_kernels.dequant_matmul import dequant_matmul
from uniql_jax.weights.delta import DeltaArray
from uniql_jax.weights.fake_quantized import FakeQuantizedArray
from uniql_jax.weights.lora import LoraArray
from uniql_jax.weights.quantized import QuantizedArray

Weight = QuantizedArray | LoraArray | DeltaArray | FakeQuantizedArray | Array


def apply_rows(x: Float[Array, "... h"], weight: Weight) -> Float[Array, "..."]:
    """y[..., *lead] = sum_h weight[*lead, h] x[..., h], for a leaf that contracts its last dimension."""
    lead = weight.shape[:-1]
    if isinstance(weight, LoraArray | DeltaArray | FakeQuantizedArray):
        y = weight.rows(x)
    elif isinstance(weight, QuantizedArray):
        tiled = weight.order != "plain"
        y = dequant_matmul(
            x,
            weight.data if tiled else weight.data.reshape(-1, weight.data.shape[-1]),
            weight.scale.reshape(-1, weight.scale.shape[-1]),
            bits=weight.bits,
            group=weight.group,
            contract="last",
            width=weight.width,
            order=weight.order,
        )
    else:
        y = _dense_rows(x, weight)
    return y.astype(x.dtype).reshape(*x.shape[:-1], *lead)


def apply_columns(x: Float[Array, "..."], weight: Weight) -> Float[Array, "... h"]:
    """y[..., h] = sum over the leading dimensions of x[..., *lead] weight[*lead, h]."""
    lead = weight.shape[:-1]
    flat = x.reshape(*x.shape[: x.ndim - len(lead)], math.prod(lead))
    if isinstance(weight, LoraArray | DeltaArray | FakeQuantizedArray):
        y = weight.columns(flat)
    elif isinstance(weight, QuantizedArray):
        y = dequant_matmul(
            flat,
            weight.data,
            weight.scale,
            bits=weight.bits,
            group=weight.group,
            contract="first",
            width=weight.width,
            order=weight.order,
        )
    else:
        y = _dense_columns(flat, weight)
    return y.astype(x.dtype)


def _dense_rows(x: Array, weight: Array) -> Array:
    flat = weight.reshape(-1, weight.shape[-1])
    return jnp.matmul(x, flat.T.astype(x.dtype), preferred_element_type=jnp.float32)


def _dense_columns(flat: Array, weight: Array) -> Array:
    return jnp.matmul(flat, weight.reshape(-1, weight.shape[-1]).astype(flat.dtype), preferred_element_type=jnp.float32)
