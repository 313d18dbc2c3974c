"""The value bias that stands for an output bias, for families whose form has no output bias."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

CUTOFF = 1e-6
"""Directions of O below this part of the largest are what rounding to float32 left of zero: nothing is put on them."""


def value_bias(
    o: Float[np.ndarray, "vo head embed"], o_bias: Float[np.ndarray, " embed"], kv_heads: int
) -> tuple[Float[np.ndarray, "vo kv_head"], Float[np.ndarray, " embed"]]:
    """The smallest value bias that O turns into an output bias as nearly as one can; solved in float64.

    A value bias reaches the output through the sum of the O columns of its query heads. Call it under
    `blas.one_blas_thread`: threads take longer to meet than the solve takes.

    Args:
        o: output weight, of any rank.
        o_bias: what is wanted.
        kv_heads: number of key/value heads.

    Returns:
        The value bias and what it gives, both float32 and finite.
    """
    ranks, heads, embed = o.shape
    columns = np.asarray(o, np.float64).reshape(ranks, kv_heads, heads // kv_heads, embed).sum(2)
    matrix = columns.reshape(-1, embed).T
    # Through the Gram matrix, whose eigenvalues are squares: float64 resolves them to the cutoff, in a twentieth of the
    # time of a singular value decomposition.
    squares, vectors = np.linalg.eigh(matrix.T @ matrix)
    kept = squares > CUTOFF**2 * squares[-1]
    inverse = np.divide(1.0, squares, where=kept, out=np.zeros_like(squares))
    solution = vectors @ (inverse * (vectors.T @ (matrix.T @ np.asarray(o_bias, np.float64))))
    return solution.reshape(ranks, kv_heads).astype(np.float32), (matrix @ solution).astype(np.float32)


def free_rank(
    v: Float[np.ndarray, "vo kv_head embed"], o: Float[np.ndarray, "vo head embed"]
) -> tuple[int, int] | None:
    """(rank, key/value head) of a channel whose V and O are zero: with a value bias of 1 it carries any output bias."""
    free = ~v.any(-1) & ~o.reshape(len(o), v.shape[1], -1).any(-1)
    found = np.argwhere(free)
    return (int(found[0][0]), int(found[0][1])) if len(found) else None
