"""How each kind of block is measured and sorted."""

from __future__ import annotations

from uniql_jax.compression.sorters import attention, mamba2, mlp
from uniql_jax.compression.sorters.base import Sorter

SORTERS: dict[str, Sorter] = {"attention": attention.SORTER, "mlp": mlp.SORTER, "mamba2": mamba2.SORTER}
"""Block kind -> its sorter; the keys are those of `elastic.BLOCKS`."""
