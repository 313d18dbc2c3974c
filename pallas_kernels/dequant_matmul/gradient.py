"""One gradient for every kernel's product: that of the specification."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from uniql_jax.pallas_kernels.dequant_matmul import reference

Product = Callable[[Array, Array, Array, Any], Array]


def differentiable(product: Product) -> Product:
    """product(x, data, scale, weight) with x of two dimensions and a plain.Weight, differentiable in x and scale."""
    run: Any = jax.custom_vjp(product, nondiff_argnums=(3,))

    def forward(x: Array, data: Array, scale: Array, weight: Any) -> tuple[Array, tuple[Array, Array, Array]]:
        return run(x, data, scale, weight), (x, data, scale)

    def backward(weight: Any, saved: tuple[Array, Array, Array], cotangent: Array) -> tuple[Array, None, Array]:
        x, data, scale = saved
        options = dataclasses.asdict(weight)
        _, pull = jax.vjp(lambda x, scale: reference.dequant_matmul(x, data, scale, **options), x, scale)
        x_bar, scale_bar = pull(cotangent)
        return x_bar, None, scale_bar

    run.defvjp(forward, backward)
    return run
