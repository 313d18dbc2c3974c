"""Which implementation of a kernel runs: the one that is named, else the environment's, else the backend's default."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax

VARIABLE = "UNIQL_KERNELS"
"""Environment variable that overrides the default: `reference` or `pallas`."""

DEFAULT_ON_GPU = "reference"
"""What runs on a GPU when nobody says otherwise; change it here once a tuned kernel is measured faster than XLA."""


def default() -> tuple[str, bool]:
    """Name of the implementation when the caller gives none, and whether the environment named it."""
    named = os.environ.get(VARIABLE, "").strip().lower()
    if named:
        return named, True
    return (DEFAULT_ON_GPU if jax.default_backend() in ("gpu", "cuda", "rocm") else "reference"), False


def pick(
    name: str, implementations: Mapping[str, Callable[..., Any]], implementation: str | None
) -> Callable[..., Any]:
    """The function to call for kernel `name`.

    A named implementation runs alone, so whatever it cannot do is raised. The default falls back to the reference for
    what it answers with NotImplementedError. Raises ValueError for a name the kernel has not.
    """
    chosen, where = implementation, ""
    if chosen is None:
        chosen, from_environment = default()
        where = f" ({VARIABLE})" if from_environment else ""
    if chosen not in implementations:
        raise ValueError(f"{name} has no implementation {chosen!r}{where}; it has {', '.join(implementations)}")
    function = implementations[chosen]
    if implementation is not None or chosen == "reference":
        return function

    @functools.wraps(function)
    def with_fallback(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except NotImplementedError:
            return implementations["reference"](*args, **kwargs)

    return with_fallback
