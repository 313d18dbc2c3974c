"""The kernels of 3-bit weights by name, and whether they compute the right product on this device."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels import selfcheck
from uniql_jax.pallas_kernels.dequant_matmul import (
    dequantize,
    dot,
    mma,
    three_bit,
    three_bit_dot,
    three_bit_mma,
    tiling,
)
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight

KERNELS = ("mma", "dot", "dequantize")
CHECKED: dict[str, tuple[int, Any]] = {
    "mma": (5, mma.Settings(along_k=2, gate=True)),
    "dot": (20, dot.Settings(tile_m=32)),
    "dequantize": (20, dequantize.Settings()),
}
"""Rows of x and settings that a kernel is tried with."""
ROWS, WIDTH = 72, 7 * tiling.GROUP
"""Of the weight that it is tried on: no whole number of tiles."""


def product(
    kernel: str, x: Float[Array, "count padded"], data: Int[Array, "..."], scale: Array, weight: Weight, settings: Any
) -> Float[Array, "count features"]:
    """x bf16 times the weight by one of KERNELS."""
    if kernel == "dequantize":
        return dequantize.product(x, data, scale, weight, settings, dense=three_bit_dot.dense)
    run = {"mma": three_bit_mma.product, "dot": three_bit_dot.product}[kernel]
    return run(x, data, scale, weight=weight, settings=settings).sum(0).astype(x.dtype)


def verify(kernel: str, layout: str) -> None:
    """Raise NotImplementedError when `kernel` is wrong for tiles in this layout, as selfcheck.verify does."""
    selfcheck.require(f"{kernel} ({layout}, 3 bits)", functools.partial(error_of, kernel, layout))


def error_of(kernel: str, layout: str) -> float:
    """Relative error of a small product, against numpy's of the bit planes."""
    rng, contract = np.random.default_rng(0), tiling.CONTRACTS[layout]
    count, settings = CHECKED[kernel]
    planes = rng.integers(0, 256, (ROWS, three_bit.BITS, WIDTH // 8), np.uint8)
    codes = np.moveaxis(np.unpackbits(planes, axis=2, bitorder="little"), 1, -1) @ np.asarray([4, 2, 1])
    scale = jnp.asarray(rng.uniform(0.5, 1.0, (ROWS, WIDTH // tiling.GROUP)), jnp.bfloat16)
    dense = (codes - three_bit.CENTRE) * np.repeat(np.asarray(scale, np.float32), tiling.GROUP, axis=1)
    data = three_bit.tile(planes if contract == "last" else planes.transpose(2, 1, 0), contract)
    x = jnp.asarray(rng.standard_normal((count, WIDTH)), jnp.bfloat16)
    weight = Weight(layout, ROWS, WIDTH // tiling.GROUP, tiling.GROUP, three_bit.BITS)
    run = jax.jit(lambda x, data, scale: product(kernel, x, data, scale, weight, settings))
    got = np.asarray(run(x, jnp.asarray(data), scale if contract == "last" else scale.T), np.float32)
    want = np.asarray(x, np.float32) @ dense.T
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
