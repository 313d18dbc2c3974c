"""Every Pallas import in one place, for JAX 0.10 to 0.12.

The Triton backend is deprecated since 0.11 and will go; a CPU-only build may lack Mosaic GPU.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

plgpu: ModuleType | None
"""Pallas's Triton backend, or None where JAX has none."""
mosaic_gpu: ModuleType | None
"""Pallas's Mosaic GPU backend, or None where JAX has none."""

try:
    from jax.experimental.pallas import triton as plgpu
except ImportError:
    plgpu = None
try:
    from jax.experimental.pallas import mosaic_gpu
except ImportError:
    mosaic_gpu = None

__all__ = ["call", "interpreted", "load", "mosaic_gpu", "pl", "plgpu", "store", "triton"]


def triton() -> ModuleType:
    """The Triton backend. Raises NotImplementedError where JAX has none, so that the dispatcher falls back."""
    if plgpu is None:
        raise NotImplementedError(f"JAX {jax.__version__} has no Pallas Triton backend")
    return plgpu


def interpreted() -> bool:
    """Whether kernels run in Pallas's interpreter: on a CPU, which has no compiler for them."""
    return jax.default_backend() == "cpu"


def call(kernel: Any, *, name: str, grid: tuple[int, ...], out_shape: Any, warps: int = 4, stages: int = 2) -> Any:
    """`pallas_call` over whole arrays for the Triton backend, or the interpreter."""
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=grid,
        interpret=interpreted(),
        compiler_params=triton().CompilerParams(num_warps=warps, num_stages=stages),
        name=name,
    )


def load(ref: Any, index: tuple[Any, ...], mask: Array) -> Array:
    """Gather ref[index] where `mask` holds, zero elsewhere; indices beyond the array are allowed where it does not."""
    return triton().load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype))


def store(ref: Any, index: tuple[Any, ...], value: Array, mask: Array) -> None:
    """Scatter `value` to ref[index] where `mask` holds."""
    triton().store(ref.at[index], value.astype(ref.dtype), mask=mask)
