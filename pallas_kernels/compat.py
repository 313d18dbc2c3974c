"""Every Pallas import in one place, for JAX 0.10 to 0.12.

The Triton backend is deprecated since 0.11 and will go; a CPU-only build may lack Mosaic GPU, and what stands below it
(its arrays of registers, MLIR's dialects) is no public interface.
"""

from __future__ import annotations

import concurrent.futures
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

plgpu: ModuleType | None
"""Pallas's Triton backend, or None where JAX has none."""
mosaic_gpu: Any
"""Pallas's Mosaic GPU backend, or None where JAX has none; so with the next five."""
mosaic: Any
"""What Mosaic GPU gives to a kernel that works on its own registers."""
ir: Any
arith: Any
llvm: Any
vector: Any
"""MLIR and its dialects, for the same kernels."""

try:
    from jax.experimental.pallas import triton as plgpu
except ImportError:
    plgpu = None
try:
    from jax.experimental.mosaic import gpu as mosaic
    from jax.experimental.pallas import mosaic_gpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector
except ImportError:
    mosaic_gpu = mosaic = ir = arith = llvm = vector = None

T = TypeVar("T")

OLD_GPU = "for NVIDIA GPUs of compute capability 8.0 or newer"
"""Why a kernel refuses any other GPU."""
MOST_ELEMENTS = 2**31 - 1
"""Of an array that a kernel indexes."""

__all__ = [
    "OLD_GPU",
    "ampere",
    "arith",
    "barrier",
    "call",
    "capability",
    "check_offsets",
    "cores",
    "count",
    "hopper",
    "interpreted",
    "ir",
    "llvm",
    "load",
    "mosaic",
    "mosaic_gpu",
    "nvidia",
    "outside_traces",
    "pl",
    "plgpu",
    "roomy",
    "store",
    "stream",
    "triton",
    "vector",
]


def triton() -> ModuleType:
    """The Triton backend. Raises NotImplementedError where JAX has none, and on GPUs that no kernel is for, so that the
    dispatcher falls back.
    """
    if plgpu is None:
        raise NotImplementedError(f"JAX {jax.__version__} has no Pallas Triton backend")
    if jax.default_backend() == "gpu" and not ampere():
        raise NotImplementedError(OLD_GPU)
    return plgpu


def interpreted() -> bool:
    """Whether kernels run in Pallas's interpreter: on a CPU, which has no compiler for them."""
    return jax.default_backend() == "cpu"


def nvidia() -> bool:
    """Whether an NVIDIA GPU computes: AMD's are "gpu" as well, and their versions may look like capabilities."""
    device = jax.devices()[0]
    about = f"{getattr(device.client, 'platform_version', '')} {device.device_kind}".lower()
    return device.platform == "gpu" and ("cuda" in about or "nvidia" in about) and "rocm" not in about


def capability() -> float:
    """Compute capability of an NVIDIA GPU, 0 for any other device."""
    text = str(getattr(jax.devices()[0], "compute_capability", "")) if nvidia() else ""
    return float(text) if text.replace(".", "", 1).isdigit() else 0.0


def ampere() -> bool:
    """Whether the device is an NVIDIA GPU with bf16 tensor cores: compute capability 8.0 or newer."""
    return capability() >= 8.0


def hopper() -> bool:
    """Whether the device has wgmma, which only Hopper does: compute capability 9."""
    return int(capability()) == 9


def cores() -> int:
    """Multiprocessors of the device; an H100's where it does not say."""
    return getattr(jax.devices()[0], "core_count", 132)


def roomy() -> bool:
    """Whether a program may hold more than 99 KiB of shared memory: not on consumer GPUs (8.6, 8.9, 12)."""
    return capability() not in (8.6, 8.9) and capability() < 12.0


def call(
    kernel: Any,
    *,
    name: str,
    grid: tuple[int, ...],
    out_shape: Any,
    warps: int = 4,
    stages: int = 2,
    aliases: dict[int, int] | None = None,
) -> Any:
    """`pallas_call` over whole arrays for the Triton backend, or the interpreter; `aliases` maps an input to the output
    that takes its place in memory. Raises NotImplementedError for arrays that 32-bit offsets do not reach.
    """
    check_offsets(name, jax.tree.leaves(out_shape))
    made = pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=grid,
        interpret=interpreted(),
        compiler_params=triton().CompilerParams(num_warps=warps, num_stages=stages),
        input_output_aliases=aliases or {},
        name=name,
    )

    def checked(*arrays: Array) -> Any:
        check_offsets(name, arrays)
        return made(*arrays)

    return checked


def check_offsets(name: str, arrays: Sequence[Any]) -> None:
    """Raise NotImplementedError for an array whose elements 32-bit offsets, as all kernels here have, do not reach."""
    for array in arrays:
        if math.prod(array.shape) > MOST_ELEMENTS:
            raise NotImplementedError(
                f"{name} counts elements in 32 bits, and an array of shape {tuple(array.shape)} has "
                f"{math.prod(array.shape)}, more than {MOST_ELEMENTS}"
            )


def load(ref: Any, index: tuple[Any, ...], mask: Array) -> Array:
    """Gather ref[index] where `mask` holds, zero elsewhere; indices beyond the array are allowed where it does not."""
    return triton().load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype))


def stream(ref: Any, index: tuple[Any, ...]) -> Array:
    """Gather ref[index], all of it inside the array, and let the first-level cache forget it before anything else."""
    return triton().load(ref.at[index], eviction_policy="evict_first")


def store(ref: Any, index: tuple[Any, ...], value: Array, mask: Array) -> None:
    """Scatter `value` to ref[index] where `mask` holds."""
    triton().store(ref.at[index], value.astype(ref.dtype), mask=mask)


def outside_traces(function: Callable[..., T], *args: Any) -> T:
    """Call a function that computes on the device although the caller may be inside a trace, in which nothing can be
    computed: a thread of its own is outside of all of them.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        return executor.submit(function, *args).result()


def barrier() -> None:
    """Wait for the whole program: what it loaded before may then be overwritten in place.

    Threads of a small tile hold copies of the same elements, so that one may store what another has yet to load.
    """
    if not interpreted():
        triton().debug_barrier()


def count(ref: Any, index: tuple[Any, ...]) -> Array:
    """Add one to ref[index], an int32, and return what it was, once all that this program stored is seen by others.

    Who then finds the number it waits for sees what those that counted before it stored.
    """
    barrier()  # all threads have stored before one of them counts
    return triton().atomic_add(ref, index, jnp.int32(1))
