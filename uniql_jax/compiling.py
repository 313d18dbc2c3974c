"""`jax.jit` for what runs some hundred times, as the pass, training and evaluation do: it must compile fast."""

from __future__ import annotations

import functools

import jax

# Trying out Triton's matrix products takes most of the time of compiling, and cuBLAS is as fast at these sizes. Its
# algorithms are not tried out either: two processes would choose differently, and round differently.
OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
jit = functools.partial(jax.jit, compiler_options=OPTIONS)
