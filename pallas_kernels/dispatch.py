"""Which implementation of a kernel runs: the one that is named, else the environment's, else the backend's default."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

VARIABLE = "UNIQL_KERNELS"
"""Environment variable that overrides the default with one of NAMES (a kernel that has it not keeps its own)."""

NAMES = ("reference", "blocked", "pallas", "jax-triton", "cudnn")

DEFAULT = "blocked"
"""What runs where nothing is known to be faster, of kernels that have it; else the reference. It never holds a whole
dequantized matrix."""

MEASURED: dict[tuple[str, str], str] = {
    ("cached_attention", "gpu"): "jax-triton",
    ("causal_attention", "gpu"): "cudnn",
    ("decode", "gpu"): "pallas",
    ("dequant_matmul", "gpu"): "pallas",
    ("rope", "gpu"): "pallas",
    ("rope_qk", "gpu"): "pallas",
}
"""Kernel and backend -> what beats the backend's default there (benchmarks/results). "decode" is a step of a model by
fused kernels (uniql_jax/model/layers/fused.py). cuDNN's attention needs no measurement: it alone holds no scores in
memory; nor does jax-triton's, of one token, which runs where the fused kernels of "decode" cannot.
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


NEXT = {"pallas": "jax-triton"}
"""What comes after an implementation on a GPU, before DEFAULT, of kernels that have it."""


class Refusal(NamedTuple):
    """A kernel's implementation that did not run, and why."""

    kernel: str
    implementation: str
    reason: str


REFUSALS: dict[Refusal, None] = {}
"""What was refused in this process, in order; `uniql inspect --kernels` shows it."""


def refuse(kernel: str, implementation: str, reason: str) -> bool:
    """Note a refusal; returns whether it is the first one of this implementation."""
    first = not any(old[:2] == (kernel, implementation) for old in REFUSALS)
    REFUSALS.setdefault(Refusal(kernel, implementation, reason))
    return first


def _say_slow(reasons: Sequence[str]) -> None:
    """Say aloud that a GPU decodes without a fast product, which costs the most of all."""
    warnings.warn(
        f"no fast kernel for 4-bit weights runs here ({'; '.join(reasons)}); a slower path is used. "
        "`uniql inspect --kernels` shows all that is missing",
        RuntimeWarning,
        stacklevel=4,
    )


@functools.cache
def note(backend: str) -> None:
    """Say once a process, in a line of the log, that nothing fast decodes on a backend that no kernel is for."""
    if backend != "gpu":  # a GPU has warnings, as soon as its kernels refuse
        logging.getLogger(__name__).warning(
            "note: fast kernels for packed weights are for NVIDIA GPUs; on this %s XLA does it all", backend.upper()
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
    backend, chosen = jax.default_backend(), default(name)
    if chosen not in implementations:
        chosen = MEASURED.get((name, backend), DEFAULT)
    faster = (chosen, NEXT.get(chosen, "") if backend == "gpu" else "")
    order = [each for each in dict.fromkeys((*faster, DEFAULT, "reference")) if each in implementations]
    if chosen == "reference" or len(order) == 1:
        return implementations["reference"]

    @functools.wraps(implementations[order[0]])
    def with_fallback(*args: Any, **kwargs: Any) -> Any:
        reasons, new = [], False
        for each in order[:-1]:
            if new and each == DEFAULT and name == "dequant_matmul" and backend == "gpu":
                _say_slow(reasons)
            try:
                return implementations[each](*args, **kwargs)
            except NotImplementedError as refusal:
                new = refuse(name, each, str(refusal))
                reasons.append(f"{each}: {refusal}")
        return implementations[order[-1]](*args, **kwargs)

    return with_fallback
