"""Kernels in Triton's own language, launched through jax-triton: for GPUs where Pallas has no Triton backend.

Neither package is imported before a GPU computes and a kernel is wanted. A launch costs some microseconds more than one
of Pallas's, which XLA captures in its graphs.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from types import ModuleType
from typing import Any

import jax

from uniql_jax.pallas_kernels import compat

INSTALL = "pip install uniql-jax[triton]"


@functools.cache
def _module() -> tuple[ModuleType | None, str | None]:
    """jax_triton, or why there is none."""
    try:
        importlib.import_module("triton")
        return importlib.import_module("jax_triton"), None
    except ModuleNotFoundError as error:
        if error.name in ("jax_triton", "triton"):
            return None, f"{error.name.replace('_', '-')} is not installed: {INSTALL}"
        return None, f"jax-triton does not import: {error}"
    except Exception as error:  # whatever another version of JAX or Triton has against it
        return None, f"jax-triton does not import: {(str(error) or type(error).__name__).splitlines()[0][:200]}"


def missing() -> str | None:
    """What this process lacks for kernels through jax-triton; None: nothing."""
    if not compat.ampere():
        return compat.OLD_GPU
    return _module()[1]


def alignment(number: int) -> int:
    """The largest power of two, up to 16, that divides a number: how wide a load along it may be."""
    return min(16, number & -number)


def call(
    kernel: Any,
    *args: Any,
    out_shape: Any,
    grid: tuple[int, ...],
    name: str,
    warps: int = 4,
    stages: int = 3,
    **constants: Any,
) -> Any:
    """Launch a function of `triton.jit` on arrays and Python numbers; outputs follow them, then compile-time constants.

    Raises NotImplementedError where jax-triton cannot run, and for arrays that 32-bit offsets do not reach.
    """
    module, lacking = _module()
    if module is None:
        raise NotImplementedError(lacking)
    arrays = [arg for arg in args if isinstance(arg, jax.Array)]
    compat.check_offsets(name, [*arrays, *jax.tree.leaves(out_shape)])
    # jax-triton 0.4 calls it out_type.
    outputs = "out_shape" if "out_shape" in inspect.signature(module.triton_call).parameters else "out_type"
    return module.triton_call(
        *args,
        kernel=kernel,
        grid=grid,
        name=name,
        num_warps=warps,
        num_stages=stages,
        compute_capability=round(10 * compat.capability()),
        **{outputs: out_shape},
        **constants,
    )
