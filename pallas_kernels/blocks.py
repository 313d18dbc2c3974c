"""Rows of several sequences as the products read them in whole lines: what one kernel writes for the next.

A matrix [count, k] lies in blocks [k / 32, count / 8, 8, 32]; a single row stays as it is.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

BLOCK = 32
"""Numbers that a row of a block holds."""


def shape(count: int, k: int, blocked: bool) -> tuple[int, ...]:
    """Of `count` rows of k numbers, in blocks if so."""
    return (k // BLOCK, -(-count // 8), 8, BLOCK) if blocked and count > 1 else (count, k)


def index(ref: Any, m: Any, k: Any) -> tuple[Any, ...]:
    """Where element (m, k) lies in an array that is plain or in blocks."""
    return (m, k) if ref.ndim == 2 else (k // BLOCK, m // 8, m % 8, k % BLOCK)


def in_blocks(x: Float[Array, "count k"]) -> Float[Array, "blocks columns 8 32"]:
    """A matrix in blocks; k is a multiple of 32, missing rows are zero."""
    count, k = x.shape
    x = jnp.pad(x, ((0, -count % 8), (0, 0)))
    return x.reshape(-1, 8, k // BLOCK, BLOCK).transpose(2, 0, 1, 3)
