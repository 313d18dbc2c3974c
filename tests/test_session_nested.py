"""Sessions at settings of the joint plan of nested bits: budgets, changes in place, requests' own rates, the server."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
import pytest

import uniql_jax
from tests import compressed, tiny
from tests.compressed import Made
from uniql_jax.commands import chat
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.errors import UserError
from uniql_jax.runtime import renesting
from uniql_jax.runtime.choice import choose
from uniql_jax.runtime.compiled import Compiled
from uniql_jax.runtime.lanes import RateUnavailable
from uniql_jax.runtime.loading import load_size
from uniql_jax.runtime.requests import Settings
from uniql_jax.runtime.watching import Watcher
from uniql_jax.server.app import Server
from uniql_jax.server.running import serving

NEAREST = dataclasses.replace(CompressionSettings(nested=True), rounding="nearest", scale_search=False)
SHAPE: dict[str, Any] = {"context": 32, "batch": 2}
WORK = 10_000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Made:
    return compressed.made(tmp_path_factory, seed)


@pytest.fixture(scope="module")
def folder(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer that chats."""
    out = tmp_path_factory.mktemp("nested") / "tiny"
    shutil.copytree(made.checkpoint("qwen2", NEAREST), out)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture
def known_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A work space that nothing need be compiled for."""
    monkeypatch.setattr(Compiled, "work_space", lambda self: WORK)


def leaves_equal(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def is_fresh(session: Any) -> None:
    """It holds what a load of its size holds, bit for bit, and says so."""
    fresh = load_size(session.checkpoint, session.size)
    leaves_equal(dict(session.model.params), dict(fresh.params))
    assert (session.model.rate, session.model.plan) == (fresh.rate, fresh.plan)
    held = sum(x.nbytes for x in jax.tree.leaves(dict(fresh.params)))
    assert session.memory()["weights"] == session._needs.weights(session.size) == held


@pytest.mark.parametrize("family", ["qwen2", pytest.param("bamba", marks=pytest.mark.slow)])
def test_weights_are_those_of_a_fresh_load(family: str, made: Made) -> None:
    """Smaller: but the coarser scales of what lost its last bit, nothing is read. Larger: no more than is missing."""
    session = uniql_jax.Elastic(made.checkpoint(family, NEAREST), **SHAPE)
    last, scales = (
        len(session.sizes) - 1,
        sum(np.prod(shape) * 2 for name, (_, shape) in session.checkpoint.tensors.items() if name.endswith(".coarse")),
    )
    for step in (last // 3, last // 2, 2 * last // 3, last, last // 4, last // 2, 0, last // 3):
        before, read = session.size, session.checkpoint.bytes_read
        session.set_size(session.sizes[step])
        read = session.checkpoint.bytes_read - read
        if before.setting is not None and session.size.setting is not None:
            missing = session.size.bytes - before.bytes
            assert 0 < read <= (missing if missing > 0 else scales)
        is_fresh(session)
    for rate in (0.25, 0.0):  # and to rates, whose weights have all bits
        session.rate = rate
        is_fresh(session)
        assert session.rate == rate


@pytest.mark.usefixtures("known_work")
def test_a_budget_takes_the_largest_setting(folder: Path) -> None:
    said: list[str] = []
    session = uniql_jax.Elastic(folder, memory_budget="1GB", say=said.append, **SHAPE)
    assert session.size.setting is None
    least, most = (session._needs.at(session.sizes[i]).total for i in (len(session.sizes) - 1, 0))
    for limit in np.linspace(least, most, 7).astype(int).tolist():
        session.fit(limit)
        steps = session.size.steps or 0
        assert session.need.total <= limit
        assert steps == 0 or session._needs.at(session.sizes[steps - 1]).total > limit
        assert (session.size.setting is None) == (limit == most)
        assert str(session.size) in session.why
    limit = (least + most) // 2
    session.fit(limit)
    again = uniql_jax.Elastic(folder, memory_budget=limit, say=said.append, **SHAPE)
    assert (again.size, again.why) == (session.size, session.why)
    assert said[1:] == [again.why]
    is_fresh(again)
    assert choose(again.checkpoint, again.size.bytes) == again.size
    with pytest.raises(UserError, match=r"too little: 0% of the kept entries.* needs .*lower context= or batch="):
        uniql_jax.Elastic(folder, memory_budget=least - 1, **SHAPE)
    fast = uniql_jax.Elastic(folder, memory_budget=(least + 9 * most) // 10, latency_budget=60, **SHAPE)
    assert fast.size.setting is None  # bits save no time
    assert fast.rate > 0


@pytest.mark.usefixtures("known_work")
def test_texts_go_on_at_every_setting(folder: Path, rng: np.random.Generator) -> None:
    """Smaller at once, larger exactly as if it had run there from the start; each token says what made it."""
    session = uniql_jax.Elastic(folder, **SHAPE)
    prompt = rng.integers(3, 256, 6).astype(np.int32)
    request = session.submit(prompt, Settings(20))
    session.step()
    small = session._needs.at(session.sizes[2 * len(session.sizes) // 3])
    need = session.fit(small.total)
    assert need.size == session.size == small.size
    assert session.rate == small.size.left_out > 0
    session.step(), session.step()
    session.fit("1GB")
    assert session.size.setting is None
    made = request.tokens
    items = list(request)
    assert {item.steps for item in items} == {None, small.size.steps}
    text = np.concatenate([prompt, np.asarray(made, np.int32)])
    alone = [int(t[0]) for t in uniql_jax.generate(session.model, text, max_new_tokens=20 - len(made))]
    rest = [item.token for item in items][len(made) :]
    assert rest[: len(alone)] == alone
    with pytest.raises(UserError, match="too little"):
        session.fit(1000)
    assert session.size.setting is None
    assert "fits 1 GB" in session.why


def test_rates_of_requests_need_all_bits(folder: Path) -> None:
    session = uniql_jax.Elastic(folder, **SHAPE)
    lane, own = session.submit([5, 6], Settings(20), 0.25), session.submit([5, 6], Settings(20), 0.0)
    free = session.submit([7, 8], Settings(20))
    session.step()
    session.set_size(session.sizes[40])
    for request in (lane, own):
        with pytest.raises(RateUnavailable, match=r"has given up some \(.*\); ask for no rate, or set"):
            list(request)
    for rate in (0.0, 0.25, session.rate):
        assert not session.runs(rate)
        with pytest.raises(RateUnavailable, match="needs all bits"):
            session.submit([5, 6], Settings(4), rate)
    assert len(list(free)) == 20
    session.rate = 0.0
    assert len(list(session.submit([5, 6], Settings(4), 0.25))) == 4


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt, which pytest would take for its own."""


@pytest.mark.parametrize("call", [0, 5, 11])
@pytest.mark.parametrize(("first", "second"), [(10, 60), (60, 10)])
def test_an_interrupted_change_leaves_a_usable_model(
    folder: Path, first: int, second: int, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between any two leaves: the next step, or the next change, whatever to, goes on from there."""
    session = uniql_jax.Elastic(folder, **SHAPE)
    session.set_size(session.sizes[first])
    real, left = renesting._changed, [call]

    def changed(*args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            monkeypatch.setattr(renesting, "_changed", real)
            raise Interrupted
        return real(*args)

    monkeypatch.setattr(renesting, "_changed", changed)
    with pytest.raises(Interrupted):
        session.set_size(session.sizes[second])
    if call == 5:
        session.rate = 0.25
        assert session.size.rate == 0.25
    else:
        session.step()
        assert session.size.steps == second
    is_fresh(session)


def test_a_change_that_cannot_be_made_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = uniql_jax.Elastic(folder, **SHAPE)
    session.set_size(session.sizes[60])
    before, why, real = session.size, session.why, session.checkpoint.part

    def part(name: str, *args: Any) -> Any:
        if name.startswith("layers.1") and args[1] != "coarse":
            raise UserError("shorter")
        return real(name, *args)

    monkeypatch.setattr(session.checkpoint, "part", part)
    with pytest.raises(UserError, match="shorter"):
        session.set_size(session.sizes[10])
    assert (session.size, session.why) == (before, why)
    is_fresh(session)


@pytest.mark.usefixtures("known_work")
def test_budgets_of_several_threads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes last decides; texts end as they should, and what the session says of itself is true."""
    session = uniql_jax.Elastic(folder, **SHAPE)
    monkeypatch.setattr(session, "_prepare", lambda size, policy: None)
    limits = [session._needs.at(session.sizes[i]).total for i in (20, 60)]
    failed: list[Exception] = []

    def fit(limit: int) -> None:
        try:
            for _ in range(4):
                session.fit(limit)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=fit, args=(limit,)) for limit in limits]
    requests = [session.submit([3 + i, 4], Settings(20)) for i in range(3)]
    for thread in threads:
        thread.start()
    assert [len(list(request)) for request in requests] == [20] * 3
    for thread in threads:
        thread.join(60)
    assert not failed
    assert session.size.steps in (20, 60)
    assert str(session.size) in session.why
    is_fresh(session)


def test_a_watcher_gives_up_bits(folder: Path) -> None:
    session = uniql_jax.Elastic(folder, **SHAPE)
    whole = session.bytes_at(session.size)
    watcher = Watcher(session, 1, reserve=1000, probe=lambda: whole + 2000 - session.bytes_at(session.size) - taken)
    taken = 30_000
    watcher.look()
    assert session.size.setting is not None
    assert whole - session.bytes_at(session.size) >= 29_000
    assert "were free" in session.why
    taken = 0
    for _ in range(3):
        watcher.look()
    assert session.size.setting is None


def test_the_server_says_what_it_runs(folder: Path) -> None:
    session = uniql_jax.Elastic(folder, **SHAPE)
    with serving(Server(session, "tiny")) as url, httpx.Client(base_url=url, timeout=100) as http:
        ask = {"prompt": "q z", "max_tokens": 2, "temperature": 0}
        size = session.sizes[40]
        session.set_size(size)
        status = http.get("/status").json()
        assert (status["setting"]["steps"], status["weight_bytes"], status["size"]) == (40, size.bytes, str(size))
        listed = {entry["id"]: entry for entry in http.get("/v1/models").json()["data"]}
        assert listed["tiny"]["weight_bytes"] == size.bytes
        assert listed["tiny"]["setting"]["says"] == str(size)
        assert listed["tiny"]["available"]
        assert not any(entry["available"] or entry["setting"] for name, entry in listed.items() if name != "tiny")
        numbers = http.get("/metrics").text
        assert "uniql_plan_steps 40.0" in numbers
        assert f"uniql_size_bytes {float(size.bytes)}" in numbers
        done = http.post("/v1/completions", json=ask | {"model": "tiny"})
        assert done.json()["system_fingerprint"] == "uniql-rate-steps-40"
        refused = http.post("/v1/completions", json=ask | {"model": "tiny@0.25"})
        assert refused.status_code == 409
        assert "needs all bits" in refused.json()["error"]["message"]
        changed = http.post("/admin/rate", json={"memory_budget": "1GB"}).json()
        assert (changed["rate"], changed["setting"]) == (0, None)
        assert "rate_changes_total 1.0" in http.get("/metrics").text


@pytest.mark.usefixtures("known_work")
def test_a_chat_within_a_budget(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"max_new_tokens": 2, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0}
    talk = chat.Chat(str(folder), 0.0, settings, context=64)
    middle = talk.session._needs.at(talk.session.sizes[40]).total
    assert chat._command(talk, f"/budget {middle}")
    assert chat._command(talk, "/stats")
    shown = capsys.readouterr().err
    assert shown.count(str(talk.session.sizes[40])) == 2
    for line, says in (("/budget 1KB", "too little"), ("/budget lots", "3GiB"), ("/budget", "3GiB")):
        with pytest.raises(UserError, match=says):
            chat._command(talk, line)
    assert talk.session.size.steps == 40
