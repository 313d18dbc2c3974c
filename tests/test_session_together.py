"""Short prompts that are read at once get what each would get alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import uniql_jax
from tests import compressed, tiny
from uniql_jax.runtime import compiled
from uniql_jax.runtime.batching import Batch
from uniql_jax.runtime.requests import Settings

SHAPE = {"context": 48, "batch": 3}
NEW = 6


EVERY = [name if name == "bamba" else pytest.param(name, marks=pytest.mark.slow) for name in compressed.FAMILIES]


@pytest.fixture(scope="module", params=EVERY)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("together") / request.param
    return tiny.packed(out, compressed.FAMILIES[request.param], 4, np.random.default_rng(3))


@pytest.fixture(autouse=True)
def two_at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a GPU, and how many prompts each reading took."""
    monkeypatch.setattr(compiled, "TOGETHER", {jax.default_backend(): 2})
    monkeypatch.setattr(compiled, "SHORT", 24)
    read: list[int] = []
    for name, many in (("admit", 1), ("admit_together", 2), ("extend", 1), ("again", 1)):
        before = getattr(compiled.Compiled, name)

        def counted(self: Any, *args: Any, before: Any = before, many: int = many) -> Any:
            read.append(many)
            return before(self, *args)

        monkeypatch.setattr(compiled.Compiled, name, counted)
    return read


def alone(model: Any, prompt: np.ndarray, **settings: Any) -> list[int]:
    return [int(token[0]) for token in uniql_jax.generate(model, prompt, max_new_tokens=NEW, **settings)]


def finished(session: Any, requests: list[Any]) -> list[list[int]]:
    while session.step():
        pass
    assert {request.reason for request in requests} <= {"length", "stop"}
    return [request.tokens for request in requests]


def test_tokens_are_those_of_each_alone(folder: Path, two_at_once: list[int], rng: np.random.Generator) -> None:
    """Five requests in three rows, one sampled, one too long to be read with another; all compiled ahead."""
    session, model = uniql_jax.Elastic(folder, **SHAPE), uniql_jax.load(folder)
    prompts = [rng.integers(3, 256, n).astype(np.int32) for n in (9, 23, 17, 30, 5)]
    settings: list[dict[str, Any]] = [{}, {"temperature": 0.9, "seed": 4}, {}, {}, {}]
    wanted = [alone(model, prompt, **how) for prompt, how in zip(prompts, settings, strict=True)]
    session.warm_up([0.0], lengths=[16, 24, 32])
    made = session._programs.compiled
    two_at_once.clear()
    requests = [session.submit(prompt, Settings(NEW, **how)) for prompt, how in zip(prompts, settings, strict=True)]
    assert finished(session, requests) == wanted
    assert sum(two_at_once) == len(prompts)
    assert 2 in two_at_once
    assert session._programs.compiled == made


def test_rows_are_read_again_at_once(folder: Path, two_at_once: list[int], rng: np.random.Generator) -> None:
    session = uniql_jax.Elastic(folder, **SHAPE, rate=0.35)
    prompts = [rng.integers(3, 256, n).astype(np.int32) for n in (9, 7, 12)]
    requests = [session.submit(prompt, Settings(NEW + 6)) for prompt in prompts]
    while min(request.made for request in requests) < 3:
        session.step()
    session.rate = 0.0
    two_at_once.clear()
    given = [len(request.tokens) for request in requests]
    found = finished(session, requests)
    assert two_at_once[:2] == [2, 1]
    model = uniql_jax.load(folder)
    for prompt, tokens, count in zip(prompts, found, given, strict=True):
        context = np.concatenate([prompt, np.asarray(tokens[:count], np.int32)])
        after = [int(t[0]) for t in uniql_jax.generate(model, context, max_new_tokens=NEW)]
        assert tokens[count:][: len(after)] == after[: len(tokens) - count]


def test_what_begins_alike_is_read_once(folder: Path, two_at_once: list[int], rng: np.random.Generator) -> None:
    """Sharing what is read is worth more than reading it at once."""
    session = uniql_jax.Elastic(folder, **SHAPE)
    same = rng.integers(3, 256, 20).astype(np.int32)
    prompts = [np.append(same, token).astype(np.int32) for token in (5, 6)]
    requests = [session.submit(prompt, Settings(NEW)) for prompt in prompts]
    finished(session, requests)
    assert 2 not in two_at_once


def test_one_may_be_cancelled_while_they_join(folder: Path, two_at_once: list[int], rng: np.random.Generator) -> None:
    """As another thread may do right after it was decided what is read at once."""
    session, model = uniql_jax.Elastic(folder, **SHAPE), uniql_jax.load(folder)
    prompts = [rng.integers(3, 256, n).astype(np.int32) for n in (9, 7)]
    requests = [session.submit(prompt, Settings(NEW)) for prompt in prompts]
    before = Batch._next

    def cancelled(self: Any, free: int) -> Any:
        found = before(self, free)
        requests[1].cancel()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "_next", cancelled)
        while session.step():
            pass
    assert requests[0].tokens == alone(model, prompts[0])
    assert requests[1].reason == "cancelled"
    assert two_at_once == [2]
