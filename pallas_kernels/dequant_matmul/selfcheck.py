"""Whether a kernel computes the right product on this device, by a small one that is run once a process.

Which elements a thread holds is a property of Triton's layouts, not a promise, and mma.py rests on it, as what is in
hopper/ does on what is no public interface of JAX; the other kernels are checked with the same few lines, so that a
compiler that gets one wrong costs time and not sense.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from uniql_jax.pallas_kernels import compat, packing
from uniql_jax.pallas_kernels.dequant_matmul import dequantize, dot, mma, tiling
from uniql_jax.pallas_kernels.dequant_matmul.hopper import cluster, wgmma
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight

BOUND = 1e-2
"""Relative error; rounding gives 2e-3, a wrong lane 1."""
ROWS, WIDTH = 72, 1024
"""Of the weight: no whole number of tiles."""


def verify(kernel: str, layout: str) -> None:
    """Raise NotImplementedError when `kernel` (mma, dot, cluster, wgmma, dequantize) is wrong for this layout."""
    complaint = _complaint(kernel, layout)
    if complaint is not None:
        raise NotImplementedError(complaint)


@functools.cache
def _complaint(kernel: str, layout: str) -> str | None:
    try:
        error = compat.outside_traces(_error, kernel, layout)
        if error < BOUND:
            return None
        what = f"is off by {error:.2g}"
    except NotImplementedError as refusal:
        return str(refusal)
    except Exception as failure:
        # Whatever a newer JAX has against Hopper's two; elsewhere, what is not the compiler's is a mistake of ours.
        if kernel not in ("wgmma", "cluster") and not isinstance(failure, jax.errors.JaxRuntimeError):
            raise
        what = f"does not compile or run ({(str(failure) or type(failure).__name__).splitlines()[0][:200]})"
    complaint = f"the {kernel} kernel {what} for data in layout {layout!r} on this device"
    warnings.warn(f"{complaint}; slower ones are used", RuntimeWarning, stacklevel=3)
    return complaint


def _error(kernel: str, layout: str) -> float:
    keys = jax.random.split(jax.random.key(0), 3)
    data = jax.random.randint(keys[0], (ROWS, WIDTH // 8), -(2**31), 2**31 - 1, jnp.int32)
    scale = jax.random.uniform(keys[1], (ROWS, WIDTH // 128), jnp.bfloat16, 0.5, 1.0)
    x = jax.random.normal(keys[2], (5 if kernel == "mma" else 20, WIDTH), jnp.bfloat16)
    dense = packing.dequantize_last(data, scale, bits=4, group=128, width=WIDTH)
    want = jnp.einsum("mk,nk->mn", x.astype(jnp.float32), dense, precision="highest")
    if layout in ("first", "groups"):
        data, scale = data.T, scale.T
    if layout in tiling.CONTRACTS:
        data = tiling.tile(data, tiling.CONTRACTS[layout])
    got = jax.jit(_product(kernel, Weight(layout, ROWS, WIDTH // 128, 128)))(x, data, scale).astype(jnp.float32)
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


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
