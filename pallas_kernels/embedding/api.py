"""Entry point of the packed embedding: checks its input and picks an implementation."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels import dispatch, packing
from uniql_jax.pallas_kernels.embedding import pallas, reference

IMPLEMENTATIONS = {"reference": reference.embed, "pallas": pallas.embed}


def embed(
    tokens: Int[Array, "*lead"],
    data: Int[Array, "vocab stored"],
    scale: Float[Array, "vocab groups"],
    *,
    bits: int,
    group: int,
    width: int,
    dtype: DTypeLike,
    implementation: str | None = None,
) -> Float[Array, "*lead width"]:
    """Rows `tokens` of a table packed along its last axis, dequantized in float32 and cast to `dtype`.

    tokens int32 [...] in 0..vocab-1 (others are clipped to that range) -> [..., width]. Only the gathered rows are
    dequantized. Raises ValueError when the table's parts do not fit each other.
    """
    packing.check(data, scale, bits=bits, group=group, contract="last", width=width)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens are integers, not {tokens.dtype}")
    function = dispatch.pick("embed", IMPLEMENTATIONS, implementation)
    return function(tokens, data, scale, bits=bits, group=group, width=width, dtype=jnp.dtype(dtype))
