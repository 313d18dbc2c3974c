"""Budgets of `uniql_jax.Elastic`: the least rate that fits, known before anything is loaded; and the watcher."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import uniql_jax
from benchmarks import session_budgets
from tests import tiny
from uniql_jax import checkpoint as checkpoint_module
from uniql_jax.errors import UserError
from uniql_jax.runtime import budget, switching
from uniql_jax.runtime.budget import SLACK
from uniql_jax.runtime.compiled import Compiled
from uniql_jax.runtime.programs import tree_bytes
from uniql_jax.runtime.requests import Settings
from uniql_jax.runtime.steps import Variant
from uniql_jax.runtime.watching import Watcher

SHAPE = {"context": 32, "batch": 2}
WORK = 50_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "model", np.random.default_rng(11))


@pytest.fixture
def known_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A work space that nothing need be compiled for."""
    monkeypatch.setattr(Compiled, "work_space", lambda self: WORK)


def sizes(session: uniql_jax.Elastic) -> tuple[int, int]:
    """Bytes of weights and cache of a session, of real arrays."""
    made = session._needs.compiled(session.size)
    cache, marks = made.empty()()
    assert marks is None  # attention alone
    return sum(x.nbytes for x in jax.tree.leaves(dict(session.model.params))), int(cache.nbytes)


def test_needs_are_what_is_held(folder: Path) -> None:
    """From shapes alone, for weights and cache; for the whole of a real session, with what the compiler says."""
    session = uniql_jax.Elastic(folder, **SHAPE)
    for rate in (0.0, 0.2, 0.35):
        need = session._needs.at(rate)
        session.rate = rate
        assert (need.weights, need.cache) == sizes(session)
    session.rate = 0.0
    advance = session._needs.compiled(0.0).advance(Variant())
    assert session.need.work >= advance.memory_analysis().temp_size_in_bytes


@pytest.mark.usefixtures("known_work")
def test_the_least_rate_that_fits(folder: Path) -> None:
    """12 budgets: what is loaded is within each, and a thousandth less of pruning would not be."""
    whole = uniql_jax.Elastic(folder, **SHAPE)
    low, high = (sum((whole._needs.weights(rate), whole._needs.cache(rate), WORK)) for rate in (0.35, 0.0))
    for limit in np.linspace(low, high, 12).astype(int).tolist():
        said: list[str] = []
        session = uniql_jax.Elastic(folder, memory_budget=limit, say=said.append, **SHAPE)
        need = session.need
        weights, cache = sizes(session)
        assert weights + cache + WORK == need.total <= limit
        if session.rate:
            assert session._needs.at(round(session.rate - 0.001, 6)).total > limit
        assert said == [session.why]
        assert f"prune rate {session.rate:g}" in session.why
    with pytest.raises(UserError, match=r"too little: prune rate 0.35 needs .* lower context= or batch="):
        uniql_jax.Elastic(folder, memory_budget=low - 1, **SHAPE)


def test_work_space_that_grows_with_the_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where it is most of what is needed, and the largest size's alone is more than a budget leaves."""
    monkeypatch.setattr(Compiled, "work_space", lambda self: 5 * tree_bytes(self.params))
    whole = uniql_jax.Elastic(folder, **SHAPE)
    low, high = (whole._needs.at(rate).total for rate in (0.35, 0.0))
    for limit in np.linspace(low, high, 9).astype(int).tolist():
        need = whole._needs.fitting(limit)
        assert need.total <= limit
        assert need.total > (1 - SLACK) * limit or whole._needs.at(round(need.size.rate - 0.001, 6)).total > limit


@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_peaks_are_within_their_budgets(folder: Path, count: int) -> None:
    """Live arrays and compiled work space of sessions whose rows are full: in each budget, and what was foretold.

    A tiny model is cut in steps of a tenth, so that the budget itself may be further off.
    """
    rows = list(session_budgets.budgets(folder, count, **SHAPE))
    assert len(rows) == count
    assert rows[0]["rate"] > rows[-1]["rate"] == 0
    for row in rows:
        assert row["peak"] <= row["need"] <= row["budget"]
        assert row["peak"] >= 0.9 * row["need"]


@pytest.mark.usefixtures("known_work")
def test_budgets_are_kept_before_anything_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_reading(*args: Any) -> Any:
        raise AssertionError("read")

    monkeypatch.setattr(checkpoint_module.ShardReader, "read", no_reading)
    with pytest.raises(UserError, match="too little"):
        uniql_jax.Elastic(folder, memory_budget=1000, **SHAPE)
    monkeypatch.setattr(budget, "memory_capacity", lambda: 10**9)
    with pytest.raises(UserError, match="too little"):
        uniql_jax.Elastic(folder, memory_budget="0.0001%", **SHAPE)


def test_work_space_of_real_steps_is_counted(folder: Path) -> None:
    """A larger context needs more of it, and a budget that only weights and cache fit is refused."""
    small = uniql_jax.Elastic(folder, context=16)._needs
    large = uniql_jax.Elastic(folder, context=64)._needs
    assert large.work(0.35) > small.work(0.35) > 0
    with pytest.raises(UserError, match="work space"):
        uniql_jax.Elastic(folder, context=16, memory_budget=small.weights(0.35) + small.cache(0.35) + 100)


@pytest.mark.usefixtures("known_work")
def test_fit_while_a_text_is_made(folder: Path) -> None:
    session = uniql_jax.Elastic(folder, **SHAPE)
    request = session.submit([5, 6, 7], Settings(12))
    session.step()
    middle = session._needs.at(0.2).total
    need = session.fit(middle)
    assert 0 < session.rate == need.rate <= 0.2
    with pytest.raises(UserError, match="too little"):
        session.fit(1000)
    assert session.rate == need.rate
    session.fit("10TB")
    assert session.rate == 0
    assert len(list(request)) == 12


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ("3GiB", 3 * 2**30), ("900 MB", 9 * 10**8), (1234, 1234), (1e3, 1000),
        ("50%", 500), (" 12.5 % ", 125), ("100%", 1000),
    ],
)  # fmt: skip
def test_budgets_as_people_write_them(given: Any, count: int) -> None:
    assert budget.parse_budget(given, lambda: 1000) == count


def test_free_memory_is_within_the_capacity() -> None:
    assert 0 < budget.free_memory() < budget.memory_capacity()


# ------------------------------------------------------------------------------------------------ latency


@pytest.mark.parametrize(("limit", "rate"), [(0.012, 0.0), (0.0075, 0.25), (0.0062, 0.38)])
def test_the_least_rate_that_is_fast_enough(
    folder: Path, monkeypatch: pytest.MonkeyPatch, limit: float, rate: float
) -> None:
    """Measured: here steps take 10 ms at rate 0 and less in proportion to what is kept."""
    monkeypatch.setattr(switching.Switching, "seconds_per_token", lambda self: 0.010 * (1 - self.rate))
    if rate > 0.35:
        with pytest.raises(UserError, match=r"6\.2 ms a token is too little: prune rate 0\.35 takes 6\.5 ms"):
            uniql_jax.Elastic(folder, latency_budget=limit, **SHAPE)
        return
    session = uniql_jax.Elastic(folder, latency_budget=limit, **SHAPE)
    assert session.rate == pytest.approx(rate, abs=0.002)
    assert "ms a token" in session.why


def test_a_real_step_takes_time(folder: Path) -> None:
    session = uniql_jax.Elastic(folder, latency_budget=60.0, **SHAPE)
    assert session.rate == 0
    assert 0 < session.seconds_per_token() < 60
    assert len(list(session.submit([3, 4, 5], Settings(4)))) == 4


# ------------------------------------------------------------------------------------------------ the watcher


class Memory:
    """A machine whose other programs take `others` of `total` bytes; the session takes what it holds."""

    def __init__(self, session: uniql_jax.Elastic, total: int):
        self.session, self.total, self.others = session, total, 0

    def free(self) -> int:
        return self.total - self.others - self.session.bytes_at(self.session.rate)


def watched(folder: Path, **settings: Any) -> tuple[uniql_jax.Elastic, Memory, Watcher]:
    session = uniql_jax.Elastic(folder, **SHAPE)
    memory = Memory(session, session.bytes_at(0.0) + 20_000)
    return session, memory, Watcher(session, 0.01, reserve=10_000, probe=memory.free, **settings)


def test_it_shrinks_at_once_and_grows_with_patience(folder: Path) -> None:
    heard: list[float] = []
    _, memory, watcher = watched(folder, patience=3, margin=0.2, changed=heard.append)
    assert [watcher.look() for _ in range(5)] == [0.0] * 5
    memory.others = 12_000
    rate = watcher.look()
    assert rate > 0
    assert memory.free() >= watcher.reserve
    assert [watcher.look() for _ in range(5)] == [rate] * 5  # neither more room nor less
    memory.others = 0
    assert [watcher.look() for _ in range(3)] == [rate, rate, 0.0]
    assert heard == [rate, 0.0]
    memory.others = 12_000
    watcher.look()
    memory.others = 0
    watcher.look(), watcher.look()
    memory.others = 12_000  # patience begins anew
    watcher.look()
    memory.others = 0
    assert watcher.look() == watcher.look() == rate


def test_it_does_not_swing(folder: Path) -> None:
    """Whatever others take, as long as that does not change, it changes the rate once at most."""
    for others in range(0, 60_000, 6_000):
        heard: list[float] = []
        _, memory, watcher = watched(folder, patience=1, changed=heard.append)
        memory.others = others
        for _ in range(8):
            watcher.look()
        assert len(heard) <= 1


def test_at_its_smallest_it_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, memory, watcher = watched(folder)
    memory.others = memory.total
    assert watcher.look() == 0.35
    watcher.look()
    assert "smallest" in caplog.text


def test_it_runs_in_the_background(folder: Path) -> None:
    session = uniql_jax.Elastic(folder, **SHAPE)
    changed = threading.Event()
    request = session.submit([3, 4, 5], Settings(20))
    session.step()
    with session.watch(0.01, reserve=1000, probe=lambda: 0, changed=lambda rate: changed.set()):
        assert changed.wait(60)
        assert len(list(request)) == 20
    assert session.rate == 0.35
    with pytest.raises(UserError, match="interval"):
        session.watch(0)
