"""Which implementation of a kernel runs: the one that is named, else the environment's, else the backend's default."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

VARIABLE = "UNIQL_KERNELS"
"""Environment variable that overrides the default with one of NAMES (a kernel that has it not keeps its own)."""

NAMES = ("reference", "blocked", "pallas", "cudnn")

DEFAULT = "blocked"
"""What runs where nothing is known to be faster, of kernels that have it; else the reference. It never holds a whole
dequantized matrix."""

MEASURED: dict[tuple[str, str], str] = {
    ("causal_attention", "gpu"): "cudnn",
    ("decode", "gpu"): "pallas",
    ("dequant_matmul", "gpu"): "pallas",
    ("rope", "gpu"): "pallas",
    ("rope_qk", "gpu"): "pallas",
}
"""Kernel and backend -> what beats the backend's default there (benchmarks/results). "decode" is a step of a model by
fused kernels (uniql_jax/model/layers/fused.py). cuDNN's attention needs no measurement: it alone holds no scores in
memory.
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
    return named() or MEASURED.get((kernel, backend)) or DEFAULT


class Refusal(NamedTuple):
    """A kernel's implementation that did not run, and why."""

    kernel: str
    implementation: str
    reason: str


REFUSALS: dict[Refusal, None] = {}
"""What was refused in this process, in order; `uniql inspect --kernels` shows it."""


def refuse(kernel: str, implementation: str, reason: str) -> None:
    """Note a refusal; the first one of a fast product on a GPU is said aloud, since decoding is then much slower."""
    first = not any(old.kernel == kernel and old.implementation == implementation for old in REFUSALS)
    REFUSALS.setdefault(Refusal(kernel, implementation, reason))
    expected = MEASURED.get((kernel, jax.default_backend())) == implementation
    if first and expected and kernel == "dequant_matmul":
        warnings.warn(
            f"no fast kernel for 4-bit weights runs here ({reason}); a slower path is used. "
            "`uniql inspect --kernels` shows all that is missing",
            RuntimeWarning,
            stacklevel=2,
        )


def pick(
    name: str, implementations: Mapping[str, Callable[..., Any]], implementation: str | None
) -> Callable[..., Any]:
    """The function to call for kernel `name`.

    A named implementation runs alone, so whatever it cannot do is raised. The default falls back to DEFAULT, then to
    the reference, for what it answers with NotImplementedError or has not. Raises ValueError when a named one does not
    exist.
    """
    if implementation is not None:
        if implementation not in implementations:
            raise ValueError(f"{name} has no implementation {implementation!r}; it has {', '.join(implementations)}")
        return implementations[implementation]
    chosen = default(name)
    if chosen not in implementations:
        chosen = MEASURED.get((name, jax.default_backend()), DEFAULT)
    order = [each for each in dict.fromkeys((chosen, DEFAULT, "reference")) if each in implementations]
    order = order[order.index(chosen) :] if chosen in order else order
    if chosen == "reference" or len(order) == 1:
        return implementations["reference"]

    @functools.wraps(implementations[order[0]])
    def with_fallback(*args: Any, **kwargs: Any) -> Any:
        for each in order[:-1]:
            try:
                return implementations[each](*args, **kwargs)
            except NotImplementedError as refusal:
                refuse(name, each, str(refusal))
        return implementations[order[-1]](*args, **kwargs)

    return with_fallback
