"""Matrix products with a leaf, whichever way it is held (see weights/protocol.py)."""

from __future__ import annotations

import math

from jaxtyping import Array, Float

from uniql_jax.weights.protocol import Weight, as_weight


def apply_rows(x: Float[Array, "... h"], weight: Weight | Array) -> Float[Array, "..."]:
    """y[..., *lead] = sum_h weight[*lead, h] x[..., h], for a leaf that contracts its last dimension."""
    y = as_weight(weight).rows(x)
    return y.astype(x.dtype).reshape(*x.shape[:-1], *weight.shape[:-1])


def apply_columns(x: Float[Array, "..."], weight: Weight | Array) -> Float[Array, "... h"]:
    """y[..., h] = sum over the leading dimensions of x[..., *lead] weight[*lead, h]."""
    lead = weight.shape[:-1]
    flat = x.reshape(*x.shape[: x.ndim - len(lead)], math.prod(lead))
    return as_weight(weight).columns(flat).astype(x.dtype)
