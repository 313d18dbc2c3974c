"""Compiled programs of sessions: shared while they are kept, bounded, and made again where they went."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uniql_jax
from tests.test_session import folder as folder
from tests.test_session import prompts_of
from uniql_jax.runtime import programs
from uniql_jax.runtime.programs import Programs, regions
from uniql_jax.runtime.requests import Settings

SHAPE: dict[str, Any] = {"context": 32, "batch": 2}


def scaled(made: Programs, size: int) -> Any:
    return made.prepare("scaled", lambda x: 2 * x, jax.ShapeDtypeStruct((size,), jnp.float32))


def test_what_was_not_used_for_long_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "MOST", 4)
    made = Programs()
    alive = [weakref.ref(scaled(made, size)) for size in range(1, 5)]
    made.used(alive[0]())
    scaled(made, 5)
    gc.collect()
    assert [found() is not None for found in alive] == [True, False, False, True]
    assert made.compiled == 5
    scaled(made, 1)
    assert made.compiled == 5
    np.testing.assert_array_equal(scaled(made, 2)(jnp.ones(2)), [2.0, 2.0])
    assert made.compiled == 6


def test_a_process_maps_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Programs()
    first = weakref.ref(scaled(made, 1))
    scaled(made, 2)
    assert first() is not None
    monkeypatch.setattr(programs, "regions", lambda: 0.7)
    scaled(made, 3)
    gc.collect()
    assert first() is None


def test_the_systems_count_is_read() -> None:
    assert 0.0 < regions() < 1.0


def test_a_session_outlives_its_programs(
    folder: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rates come and go; with room for a few programs the texts are those that a session with room gives."""
    [prompt] = prompts_of(rng, 5)

    def texts() -> list[list[int]]:
        session = uniql_jax.Elastic(folder("qwen2"), **SHAPE)
        made = []
        for rate in (0.0, 0.35, 0.0):
            session.rate = rate
            made.append(list(session.submit(prompt, Settings(3))))
        assert len(session._programs._made) <= programs.MOST
        return made

    usual = texts()
    programs.programs_of.cache_clear()
    monkeypatch.setattr(programs, "MOST", 3)
    assert texts() == usual
    programs.programs_of.cache_clear()
