"""The door to the dequantizing matrix product: checks its input and picks an implementation."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, packing
from pallas_kernels.dequant_matmul import blocked, pallas, reference

IMPLEMENTATIONS = {
    "reference": reference.dequant_matmul,
    "blocked": blocked.dequant_matmul,
    "pallas": pallas.dequant_matmul,
}


def dequant_matmul(
    x: Float[Array, "*lead width"],
    data: Int[Array, "a b"],
    scale: Float[Array, "c d"],
    *,
    bits: int,
    group: int,
    contract: str,
    width: int,
    implementation: str | None = None,
) -> Float[Array, "*lead out"]:
    """Multiply x [..., width] by a packed weight -> [..., rows or features] in x's dtype, accumulated in float32.

    contract "last": data [rows, stored], scale [rows, groups], y = x Wᵀ. contract "first": data [stored, features],
    scale [groups, features], y = x W. 4 bits: data int32 of eight weights a word (packing.SHIFTS, weight + 8); 8 bits:
    int8. `width` counts the contracted weights; groups * group of them are stored and those beyond `width` are ignored.
    Differentiable in x and scale. Raises ValueError when the parts do not fit; a named `implementation` that cannot do
    this shape raises NotImplementedError, the default one falls back to the reference.
    """
    packing.check(data, scale, bits=bits, group=group, contract=contract, width=width)
    if x.ndim < 1 or x.shape[-1] != width:
        raise ValueError(f"x of shape {x.shape} does not end in the weight's width {width}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is floating point, not {x.dtype}")
    function = dispatch.pick("dequant_matmul", IMPLEMENTATIONS, implementation)
    return function(x, data, scale, bits=bits, group=group, contract=contract, width=width)
