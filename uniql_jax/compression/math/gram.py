"""Gram matrices of activations."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def gram(x: Float[Array, "..."], width: int) -> Float[Array, "w w"]:
    """Sum of outer products of the rows of x seen as [rows, width], float32."""
    rows = x.astype(jnp.float32).reshape(-1, width)
    return rows.T @ rows
