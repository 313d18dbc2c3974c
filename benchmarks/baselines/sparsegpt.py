"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774) at 2:4: inputs in turn, what is cut is made up for by those after.

With U^T U = (H + 0.01 mean diag H)^-1, U upper triangular: at every fourth input an output drops the two weights of the
smallest w_j^2 / U_jj^2 among the next four; then w_j+ -= (w_j - q_j) U_j,j+ / U_jj with q_j = 0 where it is dropped.
Layers one after another, each seen on the stream of the pruned ones before it; embedding and head stay dense.

Evaluated: dense matrices with zeros. Counted: values that stay and their indices. At 4 bits GPTQ keeps the zeros (the
paper's joint form chooses both at once).
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.baselines import semistructured
from benchmarks.baselines.dense import Calibration, Made


def rows(calibration: Calibration) -> Iterator[Made]:
    """The one model there is."""
    return semistructured.rows(calibration, semistructured.prune_columns)
