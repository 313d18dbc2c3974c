"""What the kernels of products are tried on before they are trusted: one small weight, and rows of x for each cut."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from uniql_jax.pallas_kernels import packing, selfcheck
from uniql_jax.pallas_kernels.dequant_matmul import dequantize, dot, mma, tiling
from uniql_jax.pallas_kernels.dequant_matmul.hopper import cluster, wgmma
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight

FEATURES, WIDTH, GROUP = 72, 1024, 128
"""Of the weight: no whole number of tiles."""
COUNTS = {
    "mma": tuple(count for count in selfcheck.ROWS if count <= mma.MOST),
    "cluster": (20,),
    "dequantize": selfcheck.ROWS[-1:],
}
"""Rows of x by kernel; all others take many."""
MANY = (20, *selfcheck.ROWS[-2:])


def verify(kernel: str, layout: str) -> None:
    """Raise NotImplementedError when `kernel` (mma, dot, cluster, wgmma, dequantize) is wrong for this layout."""
    error = functools.partial(_error, kernel, layout)
    selfcheck.require(f"{kernel} ({layout})", error, interface=kernel in ("wgmma", "cluster"))


def _error(kernel: str, layout: str) -> float:
    run = _product(kernel, Weight(layout, FEATURES, WIDTH // GROUP, GROUP))
    return worst(lambda xs, data, scale: [run(x, data, scale) for x in xs], layout, COUNTS.get(kernel, MANY))


def worst(
    products: Callable[[list[Array], Array, Array], list[Array]],
    layout: str,
    counts: tuple[int, ...],
    *,
    bits: int = 4,
) -> float:
    """The largest relative error of products of x, of each count of rows, with one weight; all compiled together."""
    rng = np.random.default_rng(0)
    data, scale, dense = packed(rng, layout, FEATURES, WIDTH, bits)
    xs = [jnp.asarray(rng.standard_normal((count, WIDTH)), jnp.bfloat16) for count in counts]
    return selfcheck.relative(jax.jit(products)(xs, data, scale), [np.asarray(x, np.float32) @ dense.T for x in xs])


def packed(
    rng: np.random.Generator, layout: str, features: int, width: int, bits: int = 4, largest: float = 1.0
) -> tuple[Array, Array, np.ndarray]:
    """A random weight in groups of GROUP: data in a layout, bf16 scales, and dense float32 [features, width]."""
    high = 8 if bits == 4 else 128
    codes = rng.integers(-high, high, (features, width))
    scale = jnp.asarray(rng.uniform(largest / 2, largest, (features, width // GROUP)), jnp.bfloat16)
    dense = codes.astype(np.float32) * np.repeat(np.asarray(scale, np.float32), GROUP, axis=1)
    stored = codes.astype(np.int8)
    if bits == 4:
        nibbles = (codes + 8).astype(np.uint32).reshape(features, -1, 8)
        stored = np.bitwise_or.reduce(nibbles << np.asarray(packing.SHIFTS, np.uint32), axis=2).view(np.int32)
    if layout in ("first", "groups"):
        stored, scale = stored.T, scale.T
    if layout in tiling.CONTRACTS:
        stored = tiling.tile(stored, tiling.CONTRACTS[layout])
    return jnp.asarray(stored), scale, dense


def _product(kernel: str, weight: Weight) -> Callable[[Array, Array, Array], Array]:
    if kernel == "mma":
        settings = mma.Settings(along_k=2, batch=2, gate=True)
        return lambda x, data, scale: mma.product(x, data, scale, weight=weight, settings=settings)[0]
    if kernel == "dot":
        joined = dot.Settings(tile_m=32, join=8 if weight.layout in tiling.CONTRACTS else 1)
        return lambda x, data, scale: dot.product(x, data, scale, weight=weight, settings=joined)[0]
    if kernel in ("wgmma", "cluster"):
        module = wgmma if kernel == "wgmma" else cluster
        # Each way to store a sum has its share of the rows, one of them by programs that load together.
        ways = {
            "wgmma": (
                wgmma.Settings(tile_m=256, cluster=2),
                wgmma.Settings(tile_m=64, split=2),
                wgmma.Settings(tile_m=64, split=2, joined=True, along_k=2),
            ),
            "cluster": (cluster.Settings(), cluster.Settings(folded=True, along_k=2, slots=4)),
        }[kernel]

        def each_way(x: Array, data: Array, scale: Array) -> Array:
            parts = zip(jnp.array_split(x, len(ways)), ways, strict=True)
            sums = [module.product(part, data, scale, weight=weight, settings=cut).sum(0) for part, cut in parts]
            return jnp.concatenate([each.astype(x.dtype) for each in sums])

        return each_way
    return lambda x, data, scale: dequantize.product(x, data, scale, weight)
