"""For tests that compile ahead of a call: JAX then puts placeholders where an annotated pytree has arrays."""

from __future__ import annotations

from typing import Any

import jaxtyping
import pytest

from uniql_jax.evaluation import timing


@pytest.fixture
def ahead_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Annotations are not checked while `timing.compile_program` lowers: a placeholder is no Array."""
    compile_program = timing.compile_program

    def unchecked(function: Any, *arguments: Any, **static: Any) -> timing.Program:
        jaxtyping.config.update("jaxtyping_disable", True)
        try:
            return compile_program(function, *arguments, **static)
        finally:
            jaxtyping.config.update("jaxtyping_disable", False)

    monkeypatch.setattr("uniql_jax.evaluation.bench.compile_program", unchecked)
