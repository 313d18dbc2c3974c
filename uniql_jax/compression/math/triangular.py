"""The inverse of a Cholesky factor, from products of matrices wherever a device multiplies faster than it solves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LEAST = 2048
"""Rows up to which a matrix is factorized as a whole."""
PRODUCTS = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X6
"""Of three bfloat16 parts of each number: float32's accuracy, from a GPU's fast units."""


def inverse_cholesky(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """L^-1, lower triangular, of the Cholesky factor L of a matrix; NaN where it is not positive definite.

    On a GPU by halves: with L = [[A, 0], [B, C]] the inverse is [[A^-1, 0], [-C^-1 B A^-1, C^-1]], and A^-1 gives B as
    well, so that all but small matrices are made by products. There a solver of triangular systems, which also works on
    the zeros, takes most of the time of a wide Hessian's factorization.

    Args:
        matrix: symmetric, float32.
    """
    return whole(matrix) if jax.default_backend() == "cpu" else by_halves(matrix)


def whole(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """`inverse_cholesky` by the solvers of the backend."""
    lower = jnp.linalg.cholesky(matrix)
    return jax.scipy.linalg.solve_triangular(lower, jnp.eye(len(matrix), dtype=matrix.dtype), lower=True)


def by_halves(matrix: Float[Array, "n n"], least: int = LEAST) -> Float[Array, "n n"]:
    """`inverse_cholesky` by products, and of matrices up to `least` rows by the solvers of the backend."""
    size = len(matrix)
    if size <= least:
        return whole(matrix)
    pieces = -(-size // least)
    cut = min(size - 1, -(-size // pieces) * (pieces // 2))

    def times(left: Array, right: Array) -> Array:
        return jnp.matmul(left, right, precision="highest" if jax.default_backend() == "cpu" else PRODUCTS)

    first = by_halves(matrix[:cut, :cut], least)
    below = times(matrix[cut:, :cut], first.T)
    second = by_halves(matrix[cut:, cut:] - times(below, below.T), least)
    corner = -times(second, times(below, first))
    return jnp.block([[first, jnp.zeros((cut, size - cut), matrix.dtype)], [corner, second]])
