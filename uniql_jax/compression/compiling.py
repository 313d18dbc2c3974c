"""`jax.jit` as the pass wants it: programs that run a few dozen times should not take longer to compile than to run."""

from __future__ import annotations

import functools

import jax

# Trying out Triton's matrix products takes most of the time of compiling, and cuBLAS is as fast at these sizes.
jit = functools.partial(jax.jit, compiler_options={"xla_gpu_enable_triton_gemm": False})
