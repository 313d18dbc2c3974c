"""What a session's rows hold is not read again; keys and values in 8 bits. Answers stay those of `generate`."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import uniql_jax
from tests import compressed, tiny
from uniql_jax.errors import UserError
from uniql_jax.runtime.batching import Batch
from uniql_jax.runtime.requests import Request, Settings
from uniql_jax.runtime.reuse import Row, Texts

NEW = 6
LLAMA, BAMBA = "llama-grouped-tied", "bamba"
SHAPE: dict[str, Any] = {"context": 64, "batch": 2}
KINDS = pytest.mark.parametrize(("family", "bits"), [(LLAMA, 16), (BAMBA, 8)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def make(family: str) -> Path:
        out = tmp_path_factory.mktemp(family) / "4-bit"
        return tiny.packed(out, compressed.FAMILIES[family], 4, np.random.default_rng(7))

    return make


@pytest.fixture(scope="module")
def session(folder: Any) -> Any:
    """One for all tests of a kind; each leaves it at rate 0 and idle."""
    return functools.cache(lambda family, bits: uniql_jax.Elastic(folder(family), cache_bits=bits, **SHAPE))


def ids(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(3, 256, count).astype(np.int32)


def ask(session: Any, prompt: np.ndarray, new: int = NEW, rate: float | None = None, **settings: Any) -> Request:
    request = session.submit(prompt, Settings(new, stops=frozenset(session.stops()), **settings), rate)
    list(request)
    return request


@pytest.fixture(scope="module")
def anew(folder: Any) -> Any:
    """What a session makes of a prompt that it reads from its beginning on, as its first; test_session.py and the first
    test here compare that with `generate`.
    """

    def make(family: str, bits: int, prompt: np.ndarray, new: int = NEW, rate: float = 0.0, **settings: Any) -> Any:
        fresh = uniql_jax.Elastic(folder(family), cache_bits=bits, rate=rate, **SHAPE)
        found = ask(fresh, prompt, new, **settings)
        assert not found.cached
        return found.tokens

    return make


@KINDS
def test_what_was_read_is_not_read_again(
    session: Any, anew: Any, folder: Any, family: str, bits: int, rng: np.random.Generator
) -> None:
    """The same prompt, the next turn, a common beginning: as many tokens as can be known, and the very same answers."""
    running = session(family, bits)
    prompt = ids(rng, 22)
    drawn: dict[str, Any] = dict(temperature=0.9, seed=4)
    first = ask(running, prompt, **drawn)
    turn = np.concatenate([prompt, np.asarray(first.tokens, np.int32), ids(rng, 5)])
    other = np.concatenate([prompt[:19], ids(rng, 9)])
    attention = family == LLAMA
    answered = len(prompt) + len(first.tokens)  # of these all but the last token were read
    wanted = [
        (prompt, 21 if attention else 22),
        (turn, answered - 1 if attention else 22),
        (other, 19 if attention else 0),
        (turn, len(turn) - 1 if attention else len(turn)),
        (prompt[:12], 0),  # too short to be worth it
    ]
    assert first.cached == 0
    for text, cached in wanted:
        found = ask(running, text, **drawn)
        assert found.cached == cached
        assert found.tokens == anew(family, bits, text, **drawn)
    whole = uniql_jax.load(folder(family))
    alone = uniql_jax.generate(whole, prompt, max_new_tokens=NEW, cache_bits=bits, **drawn)
    assert [int(token[0]) for token in alone] == first.tokens


@KINDS
def test_rows_that_come_and_go_keep_what_they_hold(
    session: Any, anew: Any, family: str, bits: int, rng: np.random.Generator
) -> None:
    """Conversations that take turns, two at a time, over many times the context: rows are moved and taken over."""
    running = session(family, bits)
    talks = [ids(rng, 18), ids(rng, 17)]
    cached = 0
    for _ in range(4):
        requests = [running.submit(talk, Settings(NEW, stops=frozenset(running.stops()))) for talk in talks]
        for i, request in enumerate(requests):
            answer = [item.token for item in request]
            assert answer == anew(family, bits, request.prompt)
            cached += request.cached
            talks[i] = np.concatenate([request.prompt, np.asarray(answer, np.int32), ids(rng, 2)])
    assert cached >= 60


def test_a_running_row_is_shared_too(session: Any, anew: Any, rng: np.random.Generator) -> None:
    """Several answers to one prompt, as the server's `n` makes them: it is read once."""
    for family, bits in ((LLAMA, 16), (BAMBA, 8)):
        running, prompt = session(family, bits), ids(rng, 20)
        requests = [running.submit(prompt, Settings(NEW, temperature=1.0, seed=i)) for i in range(4)]
        found = [[item.token for item in request] for request in requests]
        assert [request.cached for request in requests] == [0] + 3 * [19 if family == LLAMA else 20]
        wanted = [anew(family, bits, prompt, temperature=1.0, seed=i) for i in range(4)]
        assert [tokens[: len(text)] for tokens, text in zip(found, wanted, strict=True)] == wanted


def test_other_weights_read_anew(session: Any, anew: Any, rng: np.random.Generator) -> None:
    """A rate is never given what another one read; caches are cut in place all the same, scales and all."""
    family, bits = BAMBA, 8
    running, prompt = session(family, bits), ids(rng, 20)
    ask(running, prompt)
    work = running.submit(prompt, Settings(40))
    for _ in range(3):
        running.step()
    running._batch.land()
    before = jax.tree.map(np.array, running._batch.cache.layers)
    held = running.memory()["cache"]
    running.rate = 0.35
    for old, new in zip(before, running._batch.cache.layers, strict=True):
        for kind, state in new.items():
            if kind == "attention":
                assert state.k.dtype == state.v.dtype == np.int8
                np.testing.assert_array_equal(state.v, old[kind].v[..., : state.v.shape[-1]])
                for mine, theirs in ((state.k_scale, old[kind].k_scale), (state.v_scale, old[kind].v_scale)):
                    np.testing.assert_array_equal(mine, theirs)
    assert running.memory()["cache"] < held
    fresh = ask(running, prompt)
    assert fresh.cached == 0
    assert fresh.tokens == anew(family, bits, prompt, rate=0.35)
    running.rate = 0.0
    assert ask(running, prompt).tokens == anew(family, bits, prompt)
    assert len(list(work)) == 40
    assert {item.rate for item in work.take(0)} == {0.0, 0.35}


def test_states_that_cannot_go_back(folder: Any, rng: np.random.Generator) -> None:
    """Without marks nothing is reused, and less is held; the needs say so beforehand."""
    prompt = ids(rng, 20)
    bare = uniql_jax.Elastic(folder(BAMBA), marks=False, **SHAPE)
    marked = uniql_jax.Elastic(folder(BAMBA), **SHAPE)
    assert [ask(bare, prompt).cached for _ in range(2)] == [0, 0]
    for running in (bare, marked):
        ask(running, prompt)
        assert running.memory()["cache"] == running._needs.cache(0.0)
    assert bare.memory()["cache"] < marked.memory()["cache"]
    with pytest.raises(UserError, match="cache_bits must be 8 or 16, not 4"):
        uniql_jax.Elastic(folder(BAMBA), cache_bits=4)


def test_an_interrupted_reading_is_made_anew(
    session: Any, anew: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(BaseException):
        pass

    running, prompt = session(LLAMA, 16), ids(rng, 20)
    ask(running, prompt)
    real, calls = Batch._read, iter([True, False])

    def lost(batch: Batch, *args: Any) -> Any:
        found = real(batch, *args)
        if next(calls, False):
            raise Interrupted
        return found

    monkeypatch.setattr(Batch, "_read", lost)
    request = running.submit(prompt, Settings(NEW, stops=frozenset(running.stops())))
    with pytest.raises(Interrupted):
        list(request)
    again = ask(running, prompt)
    assert again.tokens == anew(LLAMA, 16, prompt)


def test_threads_share_what_was_read(session: Any, anew: Any, rng: np.random.Generator) -> None:
    running, start = session(LLAMA, 16), ids(rng, 18)
    prompts = [np.concatenate([start, ids(rng, n)]) for n in (3, 9, 5, 12)]
    found: dict[int, list[int]] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: ask(running, prompts[i]).tokens})) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {i: anew(LLAMA, 16, prompt) for i, prompt in enumerate(prompts)}


def test_texts_are_where_they_are_said_to_be(rng: np.random.Generator) -> None:
    """Against a plain list of slots: whatever is moved, taken over or written behind, what is found is there."""
    slots, rows = 48, 3
    texts = Texts(rows, slots, lambda n: -(-n // 4) * 4)
    cache = np.zeros((rows, slots), np.int32)
    slot, reused = 20, 0
    known = [ids(rng, 20) for _ in range(3)]
    for _ in range(300):
        prompt = np.concatenate([known[rng.integers(3)][: rng.integers(1, 21)], ids(rng, int(rng.integers(0, 9)))])
        if len(prompt) > slot or slot > 40:
            wanted = max(len(prompt), texts.longest)
            by = texts.moves(wanted - slot)
            cache = np.stack([np.roll(row, n) for row, n in zip(cache, by, strict=True)])
            slot = wanted
        source, first, count = texts.find(prompt, False)
        np.testing.assert_array_equal(cache[source, first : first + count], prompt[:count])
        assert count < len(prompt)
        reused += count > 0
        i = texts.place(list(range(rows)), source, count, False)
        cache[i] = np.roll(np.pad(prompt, (0, slots - len(prompt))), slot - len(prompt))
        texts.put(i, Row(Request(prompt, Settings(), lambda: None), 1), slot - len(prompt), len(prompt))
        step = int(rng.integers(0, 3))
        cache[:, slot : slot + step] = -1  # every row is written to, whoever is at work
        slot += step
    assert reused > 15
