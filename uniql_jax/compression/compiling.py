"""`jax.jit` as the pass wants it: programs that run a few dozen times should not take longer to compile than to run."""

from __future__ import annotations

import functools

import jax

from uniql_jax.compression.settings import PRECISIONS, CompressionSettings

# Trying out Triton's matrix products takes most of the time of compiling, and cuBLAS is as fast at these sizes. Its
# algorithms are not tried out either: two processes would choose differently, and round differently.
jit = functools.partial(jax.jit, compiler_options={"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0})


def matmul_precision(settings: CompressionSettings, *, solves: bool = False) -> str:
    """What `jax.default_matmul_precision` takes on this device, for activations or for what is solved from them."""
    if jax.default_backend() == "cpu":
        return PRECISIONS["float32"]
    return PRECISIONS["bf16x3" if solves and settings.precision != "float32" else settings.precision]
