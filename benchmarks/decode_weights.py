"""Random weights of a decode step for benchmarks/decode_kernels.py, with 4 bits in some entries and 3 in the others."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from uniql_jax.pallas_kernels.dequant_matmul import tiling
from uniql_jax.pallas_kernels.dequant_matmul.fused import Job
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight

Held = tuple[tuple[Weight, ...], list[tuple[jax.Array, ...]]]
"""The static halves of a leaf's entries of 4 bits and of 3, and operands for every layer."""


def weight(features: int, width: int, layout: str, seed: int, share: float, layers: int) -> Held:
    """A random leaf of which a share of the entries has 4 bits."""
    sorted_axis = features if layout == "rows" else width
    border = round(sorted_axis * share / 128) * 128
    parts: list[Weight] = []
    for bits, count in ((4, border), (3, sorted_axis - border)):
        rows, contracted = (count, width) if layout == "rows" else (features, count)
        parts += [Weight(layout, rows, contracted // 128, 128, bits)] if count else []
    return tuple(parts), [
        tuple(array for part in parts for array in random_operands(part, 1000 * seed + layer))
        for layer in range(layers)
    ]


def random_operands(part: Weight, seed: int) -> tuple[jax.Array, jax.Array]:
    """Data and scales."""
    words, span = tiling.SHAPES[part.bits]
    tiles, scales = (part.features // 16, -(-part.groups // span)), (part.features, part.groups)
    if part.layout == "groups":
        tiles, scales = tiles[::-1], scales[::-1]
    keys = jax.random.split(jax.random.key(10 * seed + part.bits, impl="unsafe_rbg"))
    data = jax.lax.bitcast_convert_type(jax.random.bits(keys[0], (*tiles, words, 32, 4), jnp.uint32), jnp.int32)
    return data, jax.random.uniform(keys[1], scales, jnp.bfloat16, 0.001, 0.004)


def job(*weights: tuple[Weight, ...], **options: Any) -> Job:
    """A product with a leaf, or with two that go row next to row."""
    first, *rest = zip(*weights, strict=True)
    return Job(first, rest=rest[0] if rest else (), **options)
