"""The kernels that multiply bf16 rows with packed weights, by name and bits."""

from __future__ import annotations

import functools
from collections.abc import Callable

from jaxtyping import Array

from uniql_jax.pallas_kernels.dequant_matmul import dequantize, dot, mma, three_bit_dot, three_bit_mma
from uniql_jax.pallas_kernels.dequant_matmul.hopper import cluster, wgmma

PRODUCTS: dict[tuple[str, int], Callable[..., Array]] = {
    ("mma", 4): mma.product,
    ("dot", 4): dot.product,
    ("cluster", 4): cluster.product,
    ("wgmma", 4): wgmma.product,
    ("mma", 3): three_bit_mma.product,
    ("dot", 3): three_bit_dot.product,
}
"""(x, data, scale, weight=, settings=) -> [split, count, features]."""
DENSE: dict[int, Callable[..., Array]] = {
    4: dequantize.product,
    3: functools.partial(dequantize.product, dense=three_bit_dot.dense),
}
"""Bits -> (x, data, scale, weight, settings) -> [count, features], by way of a dense weight."""
