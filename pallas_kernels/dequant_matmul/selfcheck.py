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
import numpy as np
from jaxtyping import Array

from uniql_jax.pallas_kernels import compat, packing
from uniql_jax.pallas_kernels.dequant_matmul import dot, mma, three_bit, tiling
from uniql_jax.pallas_kernels.dequant_matmul.hopper import cluster, wgmma
from uniql_jax.pallas_kernels.dequant_matmul.products import DENSE, PRODUCTS
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight

BOUND = 1e-2
"""Relative error; rounding gives 2e-3, a wrong lane 1."""
ROWS, WIDTH = 72, 1024
"""Of the weight: no whole number of tiles."""


def verify(kernel: str, layout: str, bits: int = 4) -> None:
    """Raise NotImplementedError when `kernel` (mma, dot, cluster, wgmma, dequantize) is wrong for this layout."""
    complaint = _complaint(kernel, layout, bits)
    if complaint is not None:
        raise NotImplementedError(complaint)


@functools.cache
def _complaint(kernel: str, layout: str, bits: int) -> str | None:
    try:
        error = compat.outside_traces(_error, kernel, layout, bits)
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
    of = "" if bits == 4 else f"{bits}-bit "
    complaint = f"the {kernel} kernel {what} for {of}data in layout {layout!r} on this device"
    warnings.warn(f"{complaint}; slower ones are used", RuntimeWarning, stacklevel=3)
    return complaint


def _error(kernel: str, layout: str, bits: int) -> float:
    keys = jax.random.split(jax.random.key(0), 3)
    scale = jax.random.uniform(keys[1], (ROWS, WIDTH // 128), jnp.bfloat16, 0.5, 1.0)
    x = jax.random.normal(keys[2], (5 if kernel == "mma" else 20, WIDTH), jnp.bfloat16)
    data, dense = (_four_bit if bits == 4 else _three_bit)(keys[0], scale, layout)
    want = jnp.einsum("mk,nk->mn", x.astype(jnp.float32), dense, precision="highest")
    scale = scale.T if layout in ("first", "groups") else scale
    weight = Weight(layout, ROWS, WIDTH // 128, 128, bits)
    got = jax.jit(_product(kernel, weight))(x, data, scale).astype(jnp.float32)
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def _four_bit(key: Array, scale: Array, layout: str) -> tuple[Array, Array]:
    """Random words in a layout, and the dense weight."""
    data = jax.random.randint(key, (ROWS, WIDTH // 8), -(2**31), 2**31 - 1, jnp.int32)
    dense = packing.dequantize_last(data, scale, bits=4, group=128, width=WIDTH)
    data = data.T if layout in ("first", "groups") else data
    return tiling.tile(data, tiling.CONTRACTS[layout]) if layout in tiling.CONTRACTS else data, dense


def _three_bit(key: Array, scale: Array, layout: str) -> tuple[Array, Array]:
    """The same, in tiles of 3 bits."""
    planes = np.asarray(jax.random.bits(key, (ROWS, three_bit.BITS, WIDTH // 8), jnp.uint8))
    contract = tiling.CONTRACTS[layout]
    given = planes if contract == "last" else planes.transpose(2, 1, 0)
    codes = (np.unpackbits(planes, axis=2, bitorder="little") * np.asarray([[4], [2], [1]])).sum(1)
    dense = (codes - three_bit.CENTRE) * np.repeat(np.asarray(scale, np.float32), 128, axis=1)
    return jnp.asarray(three_bit.tile(given, contract)), jnp.asarray(dense, jnp.float32)


def _product(kernel: str, weight: Weight) -> Callable[[Array, Array, Array], Array]:
    if kernel == "mma":
        settings = mma.Settings(along_k=2, batch=2, gate=True)
        mma_product = PRODUCTS["mma", weight.bits]
        return lambda x, data, scale: mma_product(x, data, scale, weight=weight, settings=settings)[0]
    if kernel == "dot":
        joined = dot.Settings(tile_m=32, join=8 if weight.layout in tiling.CONTRACTS else 1)
        dot_product = PRODUCTS["dot", weight.bits]
        return lambda x, data, scale: dot_product(x, data, scale, weight=weight, settings=joined)[0]
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
    return lambda x, data, scale: DENSE[weight.bits](x, data, scale, weight)
