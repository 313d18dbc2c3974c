"""Which implementation of a kernel runs: the one that is named, else the environment's, else the backend's default."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax

VARIABLE = "UNIQL_KERNELS"
"""Environment variable that overrides the default with one of NAMES (a kernel that has it not uses the reference)."""

NAMES = ("reference", "blocked", "pallas")

DEFAULTS = {"cpu": "blocked", "gpu": "reference"}
"""What runs on each backend when nobody says otherwise; elsewhere the reference. The GPU's changes here, to `pallas`,
once its kernels are measured to be faster than XLA."""


def default() -> str:
    """The implementation to use when the caller names none. Raises ValueError when the environment's is unknown."""
    named = os.environ.get(VARIABLE, "").strip().lower()
    if named and named not in NAMES:
        raise ValueError(f"{VARIABLE} is one of {', '.join(NAMES)}, not {named!r}")
    return named or DEFAULTS.get(jax.default_backend(), "reference")


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
    chosen = default()
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
