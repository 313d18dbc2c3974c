"""Which implementation of a kernel runs: the one that is named, else the environment's, else the backend's default."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax

VARIABLE = "UNIQL_KERNELS"
"""Environment variable that overrides the default with one of NAMES (a kernel that has it not keeps its own)."""

NAMES = ("reference", "blocked", "pallas", "cudnn")

DEFAULTS = {"cpu": "blocked", "gpu": "reference"}
"""What runs on each backend when nobody says otherwise; elsewhere the reference."""

MEASURED: dict[tuple[str, str], str] = {
    ("causal_attention", "gpu"): "cudnn",
    ("decode", "gpu"): "pallas",
    ("dequant_matmul", "gpu"): "pallas",
    ("rope", "gpu"): "pallas",
    ("rope_qk", "gpu"): "pallas",
}
"""Kernel and backend -> what beats the backend's default there (benchmarks/results). "decode" is a step of a model by
fused kernels (uniql_jax/layers/fused.py). cuDNN's attention needs no measurement: it alone holds no scores in memory.
"""


def named() -> str | None:
    """The implementation that the environment names, or None. Raises ValueError when it is unknown."""
    name = os.environ.get(VARIABLE, "").strip().lower()
    if name and name not in NAMES:
        raise ValueError(f"{VARIABLE} is one of {', '.join(NAMES)}, not {name!r}")
    return name or None


def default(kernel: str = "") -> str:
    """What runs for a kernel when the caller names nothing. Raises ValueError when the environment's is unknown."""
    backend = jax.default_backend()
    return named() or MEASURED.get((kernel, backend)) or DEFAULTS.get(backend, "reference")


def pick(
    name: str, implementations: Mapping[str, Callable[..., Any]], implementation: str | None
) -> Callable[..., Any]:
    """The function to call for kernel `name`.

    A named implementation runs alone, so whatever it cannot do is raised. The default falls back to the reference for
    what it answers with NotImplementedError or has not. Raises ValueError when a named one does not exist.
    """
    if implementation is not None:
        if implementation not in implementations:
            raise ValueError(f"{name} has no implementation {implementation!r}; it has {', '.join(implementations)}")
        return implementations[implementation]
    chosen = default(name)
    if chosen not in implementations:
        chosen = MEASURED.get((name, jax.default_backend()), "reference")
    if chosen not in implementations or chosen == "reference":
        return implementations["reference"]
    function = implementations[chosen]

    @functools.wraps(function)
    def with_fallback(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except NotImplementedError:
            return implementations["reference"](*args, **kwargs)

    return with_fallback
