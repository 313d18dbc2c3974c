"""`uniql_jax.Elastic`: the rate changes while texts are made, and what is left is what a fresh load has."""

from __future__ import annotations

import functools
import gc
import math
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uniql_jax
from tests import compressed, tiny
from uniql_jax.errors import UserError
from uniql_jax.model.decoding import decode, init_cache, prefill
from uniql_jax.runtime import resizing
from uniql_jax.runtime.batching import Batch
from uniql_jax.runtime.choice import Choice
from uniql_jax.runtime.requests import Settings

NEW = 10
EVERY = [name if name == "bamba" else pytest.param(name, marks=pytest.mark.slow) for name in compressed.FAMILIES]
SHAPE = {"context": 32, "batch": 2}  # the same everywhere, so that little is compiled


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(family, bits) -> its elastic checkpoint, of random weights."""

    @functools.cache
    def make(family: str, bits: int = 4) -> Path:
        out = tmp_path_factory.mktemp(family) / f"{bits}-bit"
        return tiny.packed(out, compressed.FAMILIES[family], bits, np.random.default_rng(7))

    return make


def prompts_of(rng: np.random.Generator, *lengths: int) -> list[np.ndarray]:
    return [rng.integers(3, 256, n).astype(np.int32) for n in lengths]


def alone(model: Any, prompt: np.ndarray, new: int = NEW, **settings: Any) -> list[int]:
    """What `generate` makes of a prompt by itself."""
    return [int(token[0]) for token in uniql_jax.generate(model, prompt, max_new_tokens=24, **settings)][:new]


def leaves_equal(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("family", EVERY)
def test_weights_are_those_of_a_fresh_load(folder: Any, family: str) -> None:
    """Up in place, down by reading exactly what is missing; bit for bit, for every leaf."""
    where = folder(family)
    session = uniql_jax.Elastic(where, **SHAPE)
    size = session.checkpoint.weight_bytes
    for before, after in [(0.0, 0.35), (0.35, 0.15), (0.15, 0.0)]:
        read = session.checkpoint.bytes_read
        session.rate = after
        leaves_equal(dict(session.model.params), dict(uniql_jax.load(where, after).params))
        assert session.checkpoint.bytes_read - read == max(size(after) - size(before), 0)
        assert session.rate == after
        held = sum(x.nbytes for x in jax.tree.leaves(dict(session.model.params)))
        assert session.memory()["weights"] == held


@pytest.mark.parametrize("bits", [8, 16])
def test_weights_of_other_bits(folder: Any, bits: int) -> None:
    where = folder("bamba", bits)
    session = uniql_jax.Elastic(where, **SHAPE, rate=0.35)
    for rate in (0.1, 0.25, 0.0):
        session.rate = rate
        leaves_equal(dict(session.model.params), dict(uniql_jax.load(where, rate).params))


@pytest.mark.parametrize("family", EVERY)
def test_caches_are_cut_like_weights(folder: Any, family: str, rng: np.random.Generator) -> None:
    """The cache after a switch up is the prefix of the one before, and decoding goes on with it exactly."""
    where = folder(family)
    model, small = uniql_jax.load(where), uniql_jax.load(where, 0.35)
    [prompt] = prompts_of(rng, 9)
    _, cache = jax.jit(lambda m, t: prefill(m, t, None, init_cache(m, 1, 12)))(model, jnp.asarray(prompt[None]))
    session = uniql_jax.Elastic(where, **SHAPE)
    pair = 2 if model.config.rope else 1
    layers = tuple(
        resizing.cut_state(session._programs, state, have, keep, pair)
        for state, have, keep in zip(cache.layers, model.keep, small.keep, strict=True)
    )
    shapes = jax.eval_shape(lambda: init_cache(small, 1, 12)).layers
    assert jax.tree.map(lambda x: x.shape, layers) == jax.tree.map(lambda x: x.shape, shapes)
    for found, whole in zip(jax.tree.leaves(layers), jax.tree.leaves(cache.layers), strict=True):
        if not model.config.rope or model.config.rope.dim == model.config.head_dim or found.ndim != 4:
            np.testing.assert_array_equal(found, np.asarray(whole)[tuple(slice(n) for n in found.shape)])
    logits, _ = jax.jit(decode)(small, jnp.asarray([5]), cache.replace(layers=layers))
    assert np.isfinite(np.asarray(logits)).all()


# ------------------------------------------------------------------------------------------------ texts


@pytest.mark.parametrize("family", EVERY)
def test_requests_that_come_and_go_get_what_each_would_alone(
    folder: Any, family: str, rng: np.random.Generator
) -> None:
    """More requests than rows, of all lengths and settings; greedy and drawn ones share a step."""
    where = folder(family)
    model = uniql_jax.load(where)
    session = uniql_jax.Elastic(where, **SHAPE)
    plain = dict(temperature=0.0, top_p=1.0, top_k=0, seed=0)
    drawn = [dict(plain, temperature=0.8, top_k=20, seed=2**32 - 3), dict(plain, temperature=1.3, top_p=0.7, seed=9)]
    wanted = [(7, 12, plain), (20, 4, plain), (2, 24, drawn[0]), (16, 1, drawn[1]), (17, 15, plain), (1, 9, drawn[0])]
    stops = session.stops()
    requests = []
    for prompt, (_, new, settings) in zip(prompts_of(rng, *(n for n, _, _ in wanted)), wanted, strict=True):
        requests.append(session.submit(prompt, Settings(new, stops=frozenset(stops), **settings)))
        for _ in range(3):
            session.step()
    while session.step():
        pass
    for request, (_, new, settings) in zip(requests, wanted, strict=True):
        expected = alone(model, request.prompt, new, **settings)
        assert request.tokens == expected
        assert request.reason == ("length" if len(expected) == new else "stop")


def test_text_goes_on_over_many_times_the_context(folder: Any, rng: np.random.Generator) -> None:
    """Rows are moved back whenever the slots run out, and forward for a prompt longer than the slot."""
    session = uniql_jax.Elastic(folder("bamba"), **SHAPE)
    model = uniql_jax.load(folder("bamba"))
    for prompt in prompts_of(rng, 3, 11, 1, 28, 5, 14):
        settings = Settings(4)
        other = session.submit(prompt[:1], Settings(20))
        found = [item.token for item in session.submit(prompt, settings)]
        assert found == alone(model, prompt, 4)
        assert [item.token for item in other] == alone(model, prompt[:1], 20)


def test_several_tokens_a_call_are_the_same_tokens(
    folder: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: requests end within a chunk, and join between chunks."""
    from uniql_jax.runtime import batching, compiled

    where = folder("bamba")
    model = uniql_jax.load(where)
    prompts = prompts_of(rng, 5, 9, 3)
    wanted = [alone(model, p, n, temperature=t) for p, n, t in zip(prompts, (6, 1, 9), (0.9, 1.0, 0.7))]
    for module in (batching, compiled):
        monkeypatch.setattr(module, "chunk", lambda: 4)
    session = uniql_jax.Elastic(where, **SHAPE)
    settings = [
        Settings(n, temperature=t, stops=frozenset(session.stops())) for n, t in zip((6, 1, 9), (0.9, 1.0, 0.7))
    ]
    requests = [session.submit(p, s) for p, s in zip(prompts, settings, strict=True)]
    assert [[item.token for item in request] for request in requests] == wanted


def test_logprobs_are_those_of_the_forward_pass(folder: Any, rng: np.random.Generator) -> None:
    where = folder("bamba")
    session, model = uniql_jax.Elastic(where, **SHAPE), uniql_jax.load(where)
    prompt, other = prompts_of(rng, 6, 4)
    session.submit(other, Settings(NEW))
    items = list(session.submit(prompt, Settings(NEW, temperature=1.0, logprobs=3, seed=4)))
    text = np.asarray([item.token for item in items])
    whole = np.concatenate([prompt, text]).astype(np.int32)
    scores = np.asarray(jax.jit(lambda m, t: jax.nn.log_softmax(m(t)[0]))(model, jnp.asarray(whole[None])))[
        len(prompt) - 1 : -1
    ]
    np.testing.assert_allclose([item.logprob for item in items], scores[np.arange(NEW), text], atol=1e-4)
    for item, row in zip(items, scores, strict=True):
        values = [value for _, value in item.top]
        np.testing.assert_allclose(values, np.sort(row)[::-1][:3], atol=1e-4)
        np.testing.assert_allclose(values, row[[token for token, _ in item.top]], atol=1e-4)
    np.testing.assert_allclose(list(session.score(prompt, text)), scores[np.arange(NEW), text], atol=1e-4)


def test_cancelled_requests_leave_their_rows(folder: Any, rng: np.random.Generator) -> None:
    where = folder("bamba")
    session = uniql_jax.Elastic(where, **SHAPE)
    first, second = prompts_of(rng, 4, 5)
    texts = session.generate(first, max_new_tokens=24)
    next(texts)
    waits, never = session.submit(second, Settings(3)), session.submit(second, Settings(3))
    never.cancel()
    texts.close()
    assert [item.token for item in waits] == alone(uniql_jax.load(where), second, 3)
    assert list(never) == []
    assert never.reason == "cancelled"
    assert not session.step()


# ------------------------------------------------------------------------------------------------ switches


def through(session: Any, prompt: np.ndarray, text: np.ndarray, switches: dict[int, float]) -> np.ndarray:
    """Log-probabilities of a text whose tokens are read one by one, with changes of the rate before some of them."""
    found, scores = [], session.score(prompt, text)
    for i in range(len(text)):
        if i in switches:
            session.rate = switches[i]
        found.append(next(scores))
    return np.asarray(found)


@pytest.mark.parametrize("family", EVERY)
def test_switches_in_the_middle_of_a_text(folder: Any, family: str, rng: np.random.Generator) -> None:
    """0 -> 0.35 -> 0.15 in mid-text: what follows is as likely as in a run at that rate with the same prefix."""
    where, (prompt, text) = folder(family), prompts_of(rng, 6, 26)
    found = through(uniql_jax.Elastic(where, **SHAPE), prompt, text, {3: 0.35, 6: 0.15})[8:]
    fresh = through(uniql_jax.Elastic(where, **SHAPE, rate=0.15), prompt, text, {})[8:]
    assert abs(math.exp(fresh.mean() - found.mean()) - 1) < 0.03
    np.testing.assert_allclose(found, fresh, atol=2e-4)


def test_a_text_can_go_on_without_being_read_again(
    folder: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up: always. Down with cache="extend": old tokens are seen as the higher rate made them, zero beyond."""
    where, [prompt] = folder("bamba"), prompts_of(rng, 6)
    session = uniql_jax.Elastic(where, **SHAPE, cache="extend")
    request = session.submit(prompt, Settings(20))
    session.step()
    monkeypatch.setattr(Batch, "_read_again", lambda self: pytest.fail("a text was read again"))
    session.rate = 0.35
    session.step()
    session._batch.land()
    small = jax.tree.map(np.array, session._batch.cache.layers)
    session.rate = 0.15
    for found, old in zip(jax.tree.leaves(session._batch.cache.layers), jax.tree.leaves(small), strict=True):
        assert np.isclose(np.asarray(found, np.float64).sum(), old.astype(np.float64).sum(), atol=1e-5)
        assert all(a >= b for a, b in zip(found.shape, old.shape, strict=True))
    assert len(list(request)) == 20


def test_tokens_after_a_switch_are_a_fresh_runs(folder: Any, rng: np.random.Generator) -> None:
    """Down: the text so far, read at the new rate, decides; and each token says at which rate it was made."""
    where, [prompt] = folder("bamba"), prompts_of(rng, 8)
    session = uniql_jax.Elastic(where, **SHAPE, rate=0.35)
    request = session.submit(prompt, Settings(2 * NEW))
    items = iter(request)
    before = [next(items) for _ in range(NEW)]
    session.rate = 0.0
    rest = [item.token for item in items]
    assert {item.rate for item in before} == {0.35}
    made = request.tokens
    at_old = sum(item.rate == 0.35 for item in request.take(0))
    assert NEW <= at_old <= NEW + 2
    text = np.concatenate([prompt, np.asarray(made[:at_old], np.int32)])
    assert made[at_old:] == alone(uniql_jax.load(where), text, 2 * NEW - at_old)
    assert made[NEW:] == rest


def test_a_second_switch_compiles_nothing(folder: Any, rng: np.random.Generator) -> None:
    """Once warm: switches, prompts of every length, and steps of every kind are there. JAX itself counts."""
    session = uniql_jax.Elastic(folder("bamba"), **SHAPE)
    session.warm_up([0.0, 0.35], sampling=False)
    texts = [session.submit(prompt, Settings(14)) for prompt in prompts_of(rng, 3, 18)]
    session.step()
    counted: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **rest: counted.append(event) if "compile" in event else None
    )
    try:
        made = session._programs.compiled
        for rate in (0.35, 0.0, 0.35, 0.0):
            session.rate = rate
            for _ in range(3):
                session.step()
        for text in texts:
            assert len(list(text)) == 14
        list(session.submit(prompts_of(rng, 11)[0], Settings(4)))
        assert session._programs.compiled == made
        assert counted == []
    finally:
        jax.monitoring.clear_event_listeners()


def test_texts_go_on_while_another_rate_is_compiled(
    folder: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of the rate in another thread holds texts up only once its programs are there."""
    where, [prompt] = folder("bamba"), prompts_of(rng, 5)
    session = uniql_jax.Elastic(where, **SHAPE)
    request = session.submit(prompt, Settings(20))
    session.step()
    asked, may_go_on, real = threading.Event(), threading.Event(), session._programs.prepare

    def slow(*args: Any, **named: Any) -> Any:
        if threading.current_thread() is changing:
            asked.set()
            assert may_go_on.wait(60)
        return real(*args, **named)

    monkeypatch.setattr(session._programs, "prepare", slow)
    changing = threading.Thread(target=session.set_rate, args=(0.35,))
    changing.start()
    assert asked.wait(60)
    for _ in range(6):
        session.step()
    assert 4 <= request.made < 20
    assert {item.rate for item in request.take(0)} == {0.0}
    may_go_on.set()
    changing.join(60)
    assert session.rate == 0.35
    assert len(list(request)) == 20
    assert request.take(0)[-1].rate == 0.35


def test_memory_after_a_switch_is_that_of_a_fresh_load(folder: Any, rng: np.random.Generator) -> None:
    """All live arrays of the process, not what the session thinks that it holds."""
    where = folder("bamba")

    def held() -> int:
        gc.collect()
        return sum(x.nbytes for x in jax.live_arrays())

    def run(session: Any) -> Any:
        texts = session.submit(prompts_of(rng, 4)[0], Settings(24))
        for _ in range(4):
            session.step()
        return texts

    base = held()
    session = uniql_jax.Elastic(where, **SHAPE)
    run(session)
    full = held() - base
    for rate in (0.35, 0.15):
        session.rate = rate
        session.step()
        changed = held() - base
        assert changed < full
        before = held()
        fresh = uniql_jax.Elastic(where, **SHAPE, rate=rate)
        run(fresh)
        assert abs(changed / (held() - before) - 1) < 0.05
        del fresh


# ------------------------------------------------------------------------------------------------ interrupts, threads


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt, which pytest would take for its own."""


def interrupting(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: set[int], after: bool) -> None:
    """Raise at some calls of a function: before it runs, or after, when its result is lost."""
    real, count = getattr(owner, name), [0]

    def wrapped(*args: Any, **named: Any) -> Any:
        count[0] += 1
        if count[0] in calls and not after:
            raise Interrupted
        found = real(*args, **named)
        if count[0] in calls:
            raise Interrupted
        return found

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", ["_run", "_admit", "_advance", "_join", "_move", "land"])
def test_an_interrupt_loses_no_token(
    folder: Any, name: str, after: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = folder("bamba")
    model = uniql_jax.load(where)
    session = uniql_jax.Elastic(where, **SHAPE)
    prompts = prompts_of(rng, 5, 12, 3)
    stops = frozenset(session.stops())
    interrupting(monkeypatch, Batch, name, {1, 2, 5, 9, 14}, after)
    requests = [session.submit(p, Settings(NEW, temperature=1.0, seed=3, stops=stops)) for p in prompts]
    interrupts = 0
    while True:
        try:
            while session.step():
                pass
            break
        except Interrupted:
            interrupts += 1
    assert interrupts >= 1
    for request in requests:
        assert request.tokens == alone(model, request.prompt, temperature=1.0, seed=3)


@pytest.mark.parametrize(("first", "second"), [(0.0, 0.35), (0.35, 0.0)])
def test_an_interrupted_switch_is_finished_later(
    folder: Any, first: float, second: float, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = folder("bamba")
    session = uniql_jax.Elastic(where, **SHAPE, rate=first)
    request = session.submit(prompts_of(rng, 5)[0], Settings(NEW))
    session.step()
    interrupting(monkeypatch, resizing, "cut" if second > first else "grow", {2}, after=True)
    with pytest.raises(Interrupted):
        session.rate = second
    assert len(list(request)) == NEW
    assert session.rate == second
    leaves_equal(dict(session.model.params), dict(uniql_jax.load(where, second).params))


def test_a_switch_that_cannot_be_made_changes_nothing(
    folder: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, [prompt] = folder("bamba"), prompts_of(rng, 5)
    session = uniql_jax.Elastic(where, **SHAPE, rate=0.35)
    request = session.submit(prompt, Settings(NEW))
    session.step()
    real = resizing.grow
    monkeypatch.setattr(
        resizing, "grow", lambda *args: real(*args) if args[2] == 0 else (_ for _ in ()).throw(UserError("shorter"))
    )
    with pytest.raises(UserError, match="shorter"):
        session.rate = 0.0
    assert session.rate == 0.35
    small = uniql_jax.load(where, 0.35)
    leaves_equal(dict(session.model.params), dict(small.params))
    assert [item.token for item in request] == alone(small, prompt)


def test_threads_share_a_session(folder: Any, rng: np.random.Generator) -> None:
    where = folder("bamba")
    session, model = uniql_jax.Elastic(where, **SHAPE), uniql_jax.load(where)
    prompts, found, failed = prompts_of(rng, 3, 9, 5, 17, 2), {}, []

    def talk(i: int) -> None:
        try:
            found[i] = [int(t[0]) for t in session.generate(prompts[i], max_new_tokens=NEW)]
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=talk, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for rate in (0.0, 0.0):
        session.rate = rate
    for thread in threads:
        thread.join(60)
    assert not failed
    assert found == {i: alone(model, prompt) for i, prompt in enumerate(prompts)}


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rate": 0.4}, "prune rate"), ({"rate": True}, "prune rate"),
        ({"rate": math.nan}, "prune rate"), ({"rate": 1e400}, "prune rate"), ({"rate": -1}, "prune rate"),
        ({"rate": 0.1, "memory_budget": "1GB"}, "not both"),
        ({"batch": 0}, "batch"), ({"batch": True}, "batch"),
        ({"context": 0}, "context"), ({"context": 10**9}, "exceeds"),
        ({"memory_budget": "lots"}, "3GiB"), ({"memory_budget": "0%"}, "share"), ({"memory_budget": "120%"}, "share"),
        ({"memory_budget": -1}, "budget"), ({"memory_budget": float("nan")}, "budget"),
        ({"memory_budget": 10**400}, "budget"), ({"memory_budget": True}, "budget"),
        ({"memory_budget": "nan"}, "3GiB"), ({"memory_budget": "-1"}, "3GiB"), ({"memory_budget": "1e400"}, "3GiB"),
        ({"memory_budget": "0B"}, "3GiB"), ({"memory_budget": "3 bananas"}, "3GiB"), ({"memory_budget": "٣GB"}, "3GiB"),
        ({"memory_budget": "9" * 999}, "3GiB"), ({"memory_budget": "1GB%"}, "3GiB"), ({"memory_budget": ""}, "3GiB"),
        ({"memory_budget": 1}, "prune rate 0.35 needs"), ({"latency_budget": 0}, "latency"),
        ({"latency_budget": True}, "latency"), ({"other_rates": -1}, "other_rates"), ({"cache_bits": 4}, "cache_bits"),
        ({"cache": "none"}, "read-again"),
    ],
)  # fmt: skip
def test_sessions_that_cannot_be(folder: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        uniql_jax.Elastic(folder("bamba"), **SHAPE | settings)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_requests_that_cannot_be(folder: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    session = uniql_jax.Elastic(folder("bamba"), **SHAPE)
    for prompt, settings, says in [
        ([], Settings(4), "empty"), ([999], Settings(4), "outside"), ([3] * 30, Settings(4), "context of 32"),
        ([3], Settings(0), "max_new_tokens"), ([3], Settings(4, temperature=math.nan), "temperature"),
        ([3], Settings(4, logprobs=21), "logprobs"), ([3], Settings(4, seed=-1), "seed"),
        ([3], Settings(4, forced=(999,)), "forced"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=says):
            session.submit(prompt, settings)
    for rate in (0.5, math.nan, -1, 1e400, True):
        with pytest.raises(UserError, match="prune rate"):
            session.rate = rate
        with pytest.raises(UserError, match="prune rate"):
            session.fit("1GB", rates=[rate])
        with pytest.raises(UserError, match="prune rate"):
            session.watch(9, rates=[rate])
    for settings in ({"interval": math.inf}, {"margin": math.nan}, {"patience": 0}):
        with pytest.raises(UserError, match="watcher"):
            session.watch(**settings)
    with pytest.raises(UserError, match="has no nested bits"):
        session.set_size(Choice(1, setting={}, steps=4))
    assert not session.step()
    with pytest.raises(UserError, match="no such checkpoint"):
        uniql_jax.Elastic(tmp_path / "nowhere")


def test_a_damaged_model_ends_its_requests(folder: Any, rng: np.random.Generator) -> None:
    session = uniql_jax.Elastic(folder("bamba"), **SHAPE)
    norm = session.model.params["norm"]
    session.model.params["norm"] = norm * math.nan
    with pytest.raises(UserError, match="not finite"):
        list(session.submit([3, 4], Settings(4)))
    session.model.params["norm"] = norm
    assert len(list(session.submit([3, 4], Settings(4)))) == 4
