"""The GPU's product: picks the kernel for this weight and number of rows, and gives all of them one gradient.

bf16 rows times 4 bits go to mma.py, dot.py, hopper/cluster.py or hopper/wgmma.py or, from some hundreds of rows where
there is no wgmma, to XLA over a weight dequantized once (tuned.py decides, selfcheck.py may overrule it); every other
dtype, 8 bits and odd groups to plain.py.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels import compat, dispatch, packing
from uniql_jax.pallas_kernels.dequant_matmul import (
    dequantize,
    dot,
    gradient,
    mma,
    plain,
    selfcheck,
    three_bit,
    three_bit_products,
    tiling,
    tuned,
)
from uniql_jax.pallas_kernels.dequant_matmul.hopper import cluster, wgmma
from uniql_jax.pallas_kernels.dequant_matmul.plain import Weight
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight as Tiled

LEAST_GROUP = 64
"""Below it most of a step of dot.py, 16 words of one group, would be padding."""


def dense(
    x: Float[Array, "count width"], data: Int[Array, "..."], scale: Float[Array, "c d"], weight: Weight
) -> Float[Array, "count features"]:
    """Dequantize to x's dtype once, then multiply, all in XLA: for so many rows that arithmetic is what takes time."""
    data = tiling.plain(data, weight.layout, scale.shape[0 if weight.contract == "last" else 1])
    unpack = packing.dequantize_last if weight.contract == "last" else packing.dequantize_first
    values = unpack(data, scale, bits=weight.bits, group=weight.group, width=weight.width).astype(x.dtype)
    # Else XLA may fuse the unpacking into a product of its own, which unpacks a weight for every tile of x.
    values = jax.lax.optimization_barrier(values)
    dims = (((1,), (1 if weight.contract == "last" else 0,)), ((), ()))
    return jax.lax.dot_general(x, values, dims, preferred_element_type=jnp.float32).astype(x.dtype)


def missing() -> str | None:
    """What this process lacks for any of these kernels; None: nothing. Each backend of Pallas is looked at alone."""
    if jax.default_backend() == "gpu" and not compat.ampere():
        return compat.OLD_GPU
    if compat.plgpu is not None or (compat.mosaic_gpu is not None and compat.hopper()):
        return None
    other = "and, on Hopper, none for Mosaic GPU" if compat.mosaic_gpu is None else "and Mosaic GPU is for Hopper alone"
    return f"JAX {jax.__version__} has no Pallas Triton backend {other}"


def available() -> bool:
    """Whether this process can run any of these kernels."""
    return missing() is None


def fast(x_dtype: Any, scale_dtype: Any, *, bits: int, group: int) -> bool:
    """Whether these operands are those that the fast kernels take, and were measured on."""
    both = x_dtype == jnp.bfloat16 and scale_dtype == jnp.bfloat16
    return both and bits in (3, 4) and group % 8 == 0 and group >= LEAST_GROUP


def _choose(x: Array, scale: Array, weight: Weight) -> tuple[Tiled, tuned.Choice] | None:
    """The fast kernel for these operands, or None where plain.py must do."""
    if not fast(x.dtype, scale.dtype, bits=weight.bits, group=weight.group):
        return None
    axis = 1 if weight.contract == "last" else 0
    layout = weight.contract if weight.layout == "plain" else weight.layout
    tiled = Tiled(layout, scale.shape[1 - axis], scale.shape[axis], weight.group, weight.bits)
    choices = tuned.choices(tiled, x.shape[0])
    if jax.default_backend() != "gpu":
        return tiled, choices[0]
    # What a kernel was seen to get wrong goes to the next more general one.
    for choice in choices:
        try:
            if choice[0] != "dense":
                (selfcheck if weight.bits != three_bit.BITS else three_bit_products).verify(choice[0], layout)
            return tiled, choice
        except NotImplementedError as refusal:
            dispatch.refuse(f"dequant_matmul ({layout})", choice[0], str(refusal))
    raise NotImplementedError(f"no kernel for {x.shape[0]} rows times {tiled} is right on this device")


@gradient.differentiable
def _product(
    x: Float[Array, "count width"], data: Int[Array, "..."], scale: Float[Array, "c d"], weight: Weight
) -> Float[Array, "count features"]:
    chosen = _choose(x, scale, weight)
    if chosen is None:
        compat.triton()
        if weight.bits == three_bit.BITS:
            raise NotImplementedError("3-bit kernels multiply bfloat16")
        return plain.product(x, data, scale, weight)
    tiled, (kernel, settings) = chosen
    if kernel == "dense":
        return dense(x, data, scale, weight)
    padded = tiled.groups * tiled.group
    if padded != weight.width:  # what is stored beyond the width must meet zeros
        x = jnp.pad(x, ((0, 0), (0, padded - weight.width)))
    if weight.bits == three_bit.BITS:
        return three_bit_products.product(kernel, x, data, scale, tiled, settings)
    if kernel == "dequantize":
        return dequantize.product(x, data, scale, tiled, settings)
    run = {"mma": mma.product, "dot": dot.product, "cluster": cluster.product, "wgmma": wgmma.product}[kernel]
    parts = run(x, data, scale, weight=tiled, settings=settings)
    return (parts[0] if parts.shape[0] == 1 else parts.sum(0)).astype(x.dtype)


def dequant_matmul(
    x: Float[Array, "*lead width"],
    data: Int[Array, "..."],
    scale: Float[Array, "c d"],
    *,
    bits: int,
    group: int,
    contract: str,
    width: int,
    layout: str = "plain",
) -> Float[Array, "*lead out"]:
    """See api.dequant_matmul.

    Raises NotImplementedError for float64, for groups that split a word, and on a GPU without bf16 tensor cores.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"the Pallas kernel multiplies 16-bit and 32-bit floats, not {x.dtype}")
    if bits == 4 and group % 8:
        raise NotImplementedError(f"a group of {group} splits a word of eight weights")
    lacking = missing()
    if lacking is not None:
        raise NotImplementedError(lacking)
    features = scale.shape[0 if contract == "last" else 1]
    if x.size == 0 or features == 0:
        raise NotImplementedError("nothing to multiply")
    out_shape = jax.ShapeDtypeStruct((x.size // width, features), x.dtype)
    compat.check_offsets("dequant_matmul", (x, data, scale, out_shape))
    weight = Weight(bits=bits, group=group, contract=contract, width=width, layout=layout)
    out: Any = _product(x.reshape(-1, width), data, scale, weight)
    return out.reshape(*x.shape[:-1], features)
