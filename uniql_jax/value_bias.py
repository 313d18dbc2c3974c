"""The value bias that stands for an output bias, for families whose form has no output bias."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def value_bias(
    o: Float[np.ndarray, "vo head embed"], o_bias: Float[np.ndarray, " embed"], kv_heads: int
) -> tuple[Float[np.ndarray, "vo kv_head"], Float[np.ndarray, " embed"]]:
    """The smallest value bias that o turns into o_bias as nearly as one can, and what it gives (both float32).

    A value bias reaches the output through the sum of the o columns of its query heads. Solved in float64.
    """
    ranks, heads, embed = o.shape
    columns = np.asarray(o, np.float64).reshape(ranks, kv_heads, heads // kv_heads, embed).sum(2)
    matrix = columns.reshape(-1, embed).T
    solution = np.linalg.lstsq(matrix, np.asarray(o_bias, np.float64), rcond=None)[0]
    return solution.reshape(ranks, kv_heads).astype(np.float32), (matrix @ solution).astype(np.float32)
