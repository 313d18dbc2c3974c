"""Entry point of the dequantizing matrix product: checks its input and picks an implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels import compat, dispatch, packing
from uniql_jax.pallas_kernels import jaxtriton as through_triton
from uniql_jax.pallas_kernels.dequant_matmul import (
    blocked,
    jaxtriton,
    pallas,
    reference,
    three_bit,
    three_bit_products,
    tiling,
)

IMPLEMENTATIONS = {
    "reference": reference.dequant_matmul,
    "blocked": blocked.dequant_matmul,
    "pallas": pallas.dequant_matmul,
    "jax-triton": jaxtriton.dequant_matmul,
}


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
    implementation: str | None = None,
) -> Float[Array, "*lead out"]:
    """Multiply x [..., width] by a packed weight -> [..., rows or features] in x's dtype, accumulated in float32.

    contract "last": data [rows, stored], scale [rows, groups], y = x Wᵀ. contract "first": data [stored, features],
    scale [groups, features], y = x W. 4 bits: data int32 of eight weights a word (packing.SHIFTS, weight + 8); 8 bits:
    int8; 3 bits come in tiles alone (three_bit.py). `width` counts the contracted weights; groups * group of them are
    stored and those beyond `width` are ignored. `layout`: "plain", or that of data in tiles (tiling.py): "rows" of
    contract "last", "groups" of "first". Differentiable in x and scale. Raises ValueError when the parts do not fit; a
    named `implementation` that cannot do this shape raises NotImplementedError, the default one falls back to
    jax-triton's kernels on a GPU, to blocks, then to the reference.
    """
    if layout == "plain":
        packing.check(data, scale, bits=bits, group=group, contract=contract, width=width)
    else:
        tiling.check(data, scale, bits=bits, group=group, contract=contract, width=width, layout=layout)
    if x.ndim < 1 or x.shape[-1] != width:
        raise ValueError(f"x of shape {x.shape} does not end in the weight's width {width}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is floating point, not {x.dtype}")
    found = dict(IMPLEMENTATIONS)
    by_default = implementation is None and dispatch.named() is None and dispatch.default("dequant_matmul") == "pallas"
    if by_default and not pallas.fast(x.dtype, scale.dtype, bits=bits, group=group):
        found.pop("pallas")  # runs there, but was never seen to win
        if compat.plgpu is not None and pallas.available():
            found.pop("jax-triton")  # likewise; where Pallas's kernels cannot run, it is what there is
    function = dispatch.pick("dequant_matmul", found, implementation)
    return function(x, data, scale, bits=bits, group=group, contract=contract, width=width, layout=layout)


def default_implementation() -> str:
    """What runs by default here, as far as that can be said before shapes are known."""
    name = dispatch.default("dequant_matmul")
    if name != "pallas" or jax.default_backend() != "gpu" or pallas.available():
        return name
    return dispatch.NEXT[name] if through_triton.missing() is None else dispatch.DEFAULT


def preferred_layout(*, bits: int, group: int, contract: str, dtype: DTypeLike) -> str:
    """The layout of data that the backend's default kernels read fastest, for products with x of this dtype."""
    wanted = dispatch.default("dequant_matmul") == "pallas" and jax.default_backend() == "gpu"
    tiles = bits in tiling.SHAPES and group == tiling.GROUP and jnp.dtype(dtype) == jnp.bfloat16
    layout = tiling.LAYOUTS[contract]
    if not wanted or not tiles or not pallas.available() or (bits == three_bit.BITS and not _three_bits_run(layout)):
        return "plain"
    return layout


def _three_bits_run(layout: str) -> bool:
    """Whether the kernel for few rows, which decoding needs, is right here; planes need no kernels, tiles do."""
    try:
        compat.triton()
        three_bit_products.verify("mma", layout)
    except NotImplementedError as refusal:
        dispatch.refuse(f"3-bit weights ({layout})", "pallas", str(refusal))
        return False
    return True
