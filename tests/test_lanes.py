"""Requests at prune rates of their own: each gets what `generate` makes at its rate, and no weights are copied."""

from __future__ import annotations

import gc
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
from uniql_jax.runtime.compiled import Compiled
from uniql_jax.runtime.lanes import RateUnavailable
from uniql_jax.runtime.prefixes import prefix, prefix_tree
from uniql_jax.runtime.requests import Settings

NEW = 10
SHAPE: dict[str, Any] = {"context": 32, "batch": 2}
RATES = (0.0, 0.15, 0.35)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid at 4 bits: attention, SSM and MLP blocks."""
    out = tmp_path_factory.mktemp("bamba") / "4-bit"
    return tiny.packed(out, compressed.FAMILIES["bamba"], 4, np.random.default_rng(7))


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[float, Any]:
    return {rate: uniql_jax.load(folder, rate) for rate in RATES}


def alone(model: Any, prompt: np.ndarray, new: int = NEW, **settings: Any) -> list[int]:
    """What `generate` makes of a prompt by itself."""
    return [int(token[0]) for token in uniql_jax.generate(model, prompt, max_new_tokens=24, **settings)][:new]


def prompts_of(rng: np.random.Generator, *lengths: int) -> list[np.ndarray]:
    return [rng.integers(3, 256, n).astype(np.int32) for n in lengths]


def submit(session: Any, prompt: np.ndarray, rate: float | None, new: int = NEW, **settings: Any) -> Any:
    return session.submit(prompt, Settings(new, stops=frozenset(session.stops()), **settings), rate)


def pointers(tree: Any) -> set[int]:
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}


def held() -> int:
    """Bytes of all live arrays, each piece of memory once."""
    gc.collect()
    found: dict[int, int] = {}
    for array in jax.live_arrays():
        where = array.unsafe_buffer_pointer()
        found[where] = max(found.get(where, 0), array.nbytes)
    return sum(found.values())


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, jnp.float32, jnp.bfloat16])
def test_a_prefix_is_the_same_memory(dtype: Any, rng: np.random.Generator) -> None:
    whole = jnp.asarray(rng.integers(0, 100, (7, 3, 2)), dtype)
    values = np.asarray(whole)
    parts = [prefix(whole, count) for count in range(8)]
    for count, part in enumerate(parts):
        assert (part.shape, part.dtype) == ((count, 3, 2), dtype)
        np.testing.assert_array_equal(np.asarray(part), values[:count])
    assert pointers(parts[1:]) == pointers(whole)
    del whole
    gc.collect()
    np.testing.assert_array_equal(np.asarray(parts[4] + 0), values[:4])
    with pytest.raises(ValueError, match="no prefix of 8"):
        prefix(parts[7], 8)
    with pytest.raises(ValueError, match="no prefix"):
        prefix_tree([parts[3]], [jax.ShapeDtypeStruct((2, 3, 1), dtype)])


def test_each_gets_what_its_rate_makes(folder: Path, models: dict[float, Any], rng: np.random.Generator) -> None:
    """More requests than rows at three rates at a time, drawn and greedy, joining while others run."""
    session = uniql_jax.Elastic(folder, **SHAPE)
    drawn = dict(temperature=0.8, top_k=20, seed=5)
    wanted = [
        (0.15, 5, {}),
        (None, 9, {}),
        (0.35, 3, drawn),
        (0.15, 14, {}),
        (0.15, 1, {}),
        (0.0, 4, {}),
        (0.35, 7, {}),
    ]
    requests = []
    for prompt, (rate, _, settings) in zip(prompts_of(rng, *(n for _, n, _ in wanted)), wanted, strict=True):
        requests.append(submit(session, prompt, rate, **settings))
        session.step()
    assert set(session.active_at()) == set(RATES)
    while session.step():
        pass
    assert session.active_at() == {0.0: 0}  # lanes close as they end, and their caches go
    for request, (rate, _, settings) in zip(requests, wanted, strict=True):
        assert request.tokens == alone(models[rate or 0.0], request.prompt, **settings)
        assert {item.rate for item in request.take(0)} <= {rate or 0.0}


def test_a_second_rate_costs_no_weights(folder: Path, rng: np.random.Generator) -> None:
    """All live arrays of the process: what a lane adds is its cache, which goes with it."""
    session = uniql_jax.Elastic(folder, **SHAPE)
    first = submit(session, prompts_of(rng, 4)[0], None, 24)
    session.step()
    session.step()
    before, reported = held(), session.memory()
    other = submit(session, prompts_of(rng, 4)[0], 0.35, 24)
    session.step()
    session.step()
    assert pointers(session._lanes.batches[0].params) == pointers(dict(session.model.params))
    cache = session._needs.cache(0.35)
    assert session.memory() == {"weights": reported["weights"], "cache": reported["cache"] + cache}
    few = 4096  # tokens on their way, masks, settings of rows
    assert cache <= held() - before <= cache + few
    other.cancel()
    session.step()
    session.step()
    assert abs(held() - before) <= few
    first.cancel()


def test_the_session_may_change_below_and_up_to_a_rate(
    folder: Path, models: dict[float, Any], rng: np.random.Generator
) -> None:
    """0 -> 0.15 -> 0 -> 0.35: a request at 0.15 runs through the first changes untouched, and ends with the last."""
    session = uniql_jax.Elastic(folder, **SHAPE)
    prompts = prompts_of(rng, 4, 6, 5)
    through, free = submit(session, prompts[0], 0.15), submit(session, prompts[1], None, 24)
    highest = submit(session, prompts[2], 0.35)
    for i, rate in enumerate((0.15, 0.0, 0.15)):
        session.step()
        session.step()
        session.rate = rate
        assert pointers(dict(session.model.params)) >= set().union(
            *(pointers(b.params) for b in session._lanes.batches)
        )
        assert through.made > i
    assert [item.token for item in through] == alone(models[0.15], prompts[0])
    again = submit(session, prompts[0], 0.15, 24)  # at the session's own rate now
    waiting = [submit(session, prompts[0], 0.15, 24) for _ in range(3)]
    session.step()
    before, weights = held(), session._needs.weights
    session.rate = 0.35
    assert before - held() >= weights(0.15) - weights(0.35)  # no lane holds on to what was cut
    for request in (again, *waiting):
        with pytest.raises(RateUnavailable, match=r"0\.15 needs weights that a session at 0\.35 does not hold"):
            list(request)
    assert [item.token for item in highest] == alone(models[0.35], prompts[2])
    assert len(list(free)) == 24


def test_a_request_at_the_sessions_rate_stays_there(
    folder: Path, models: dict[float, Any], rng: np.random.Generator
) -> None:
    """When weights grow, it goes on in a lane, in a row that has read it again."""
    session = uniql_jax.Elastic(folder, **SHAPE, rate=0.15)
    prompts = prompts_of(rng, 4, 6, 3)
    requests = [submit(session, prompt, 0.15) for prompt in prompts]
    for _ in range(3):
        session.step()
    assert requests[0].made
    session.rate = 0.0
    assert set(session.active_at()) == {0.0}
    free = submit(session, prompts[0], None)
    assert [[item.token for item in request] for request in requests] == [alone(models[0.15], p) for p in prompts]
    assert [item.token for item in free] == alone(models[0.0], prompts[0])


def test_rates_that_cannot_be_had(folder: Path, rng: np.random.Generator) -> None:
    [prompt] = prompts_of(rng, 3)
    session = uniql_jax.Elastic(folder, **SHAPE, rate=0.15)
    with pytest.raises(RateUnavailable, match=r"ask for 0\.15 or more, or set the session's rate to 0\.1"):
        submit(session, prompt, 0.1)
    for bad in (0.4, -0.1, float("nan")):
        with pytest.raises(UserError, match="prune rate"):
            submit(session, prompt, bad)
    busy = uniql_jax.Elastic(folder, **SHAPE, other_rates=1)
    submit(busy, prompt, 0.15)
    busy.step()
    with pytest.raises(RateUnavailable, match=r"\(0\.15\) take the place of 0\.35") as caught:
        submit(busy, prompt, 0.35)
    assert caught.value.busy
    assert submit(busy, prompt, 0.15)
    for bad in (-1, 100, True):
        with pytest.raises(UserError, match="other_rates"):
            uniql_jax.Elastic(folder, **SHAPE, other_rates=bad)


def test_budgets_count_the_caches_of_other_rates(
    folder: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Compiled, "work_space", lambda self: 50_000)  # which takes compiling
    [prompt] = prompts_of(rng, 3)
    one = uniql_jax.Elastic(folder, **SHAPE, memory_budget="1GB")
    with pytest.raises(RateUnavailable, match="one prune rate at a time, 0 now"):
        submit(one, prompt, 0.35)
    assert not one.runs(0.35)
    two = uniql_jax.Elastic(folder, **SHAPE, memory_budget="1GB", other_rates=1)
    assert two.need.cache == 2 * one.need.cache
    assert two.runs(0.35)
    submit(two, prompt, 0.35)
    free = uniql_jax.Elastic(folder, **SHAPE)
    request = submit(free, prompt, 0.35, 20)
    free.step()
    limit = one.need.total  # holds the session, not the other rate's cache as well
    assert free.fit(limit).rate > 0
    assert len(list(request)) == 20
    with pytest.raises(RateUnavailable, match="one prune rate"):
        submit(free, prompt, 0.35)


def test_threads_at_several_rates(folder: Path, models: dict[float, Any], rng: np.random.Generator) -> None:
    session = uniql_jax.Elastic(folder, **SHAPE)
    prompts, found = prompts_of(rng, 3, 9, 5, 17, 2, 4), {}

    def talk(i: int) -> None:
        texts = session.generate(prompts[i], max_new_tokens=NEW, rate=RATES[i % 3])
        found[i] = [int(token[0]) for token in texts]

    threads = [threading.Thread(target=talk, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {i: alone(models[RATES[i % 3]], prompt) for i, prompt in enumerate(prompts)}


def test_a_damaged_lane_ends_its_own_requests(folder: Path, rng: np.random.Generator) -> None:
    session = uniql_jax.Elastic(folder, **SHAPE)
    [prompt] = prompts_of(rng, 4)
    free, other = submit(session, prompt, None, 24), submit(session, prompt, 0.35, 24)
    session.step()
    [lane] = session._lanes.batches
    lane.params = dict(lane.params) | {"norm": lane.params["norm"] * np.nan}
    with pytest.raises(UserError, match="not finite"):
        list(other)
    assert len(list(free)) == 24
