"""Kernels are tried before they are trusted: once for a device and a version, and what is wrong is not used."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uniql_jax.pallas_kernels import dispatch, selfcheck
from uniql_jax.pallas_kernels.attention import decode_pallas
from uniql_jax.pallas_kernels.dequant_matmul import fused
from uniql_jax.pallas_kernels.embedding import pallas as embedding
from uniql_jax.pallas_kernels.rope import pallas as rope_pallas
from uniql_jax.pallas_kernels.rope import rope
from uniql_jax.pallas_kernels.ssd import pallas as ssd


def counted(error: float) -> tuple[Callable[[], float], list[int]]:
    """A check that finds an error, and a list that grows each time it runs."""
    runs: list[int] = []
    return lambda: (runs.append(1), error)[1], runs


def test_what_passed_is_remembered_for_this_device(checked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check, runs = counted(1e-3)
    for _ in range(2):
        selfcheck.require("k", check)
    monkeypatch.setattr(selfcheck, "FOUND", {})  # as in another process
    selfcheck.require("k", check)
    assert len(runs) == 1
    selfcheck.require("another", check)
    monkeypatch.setattr(selfcheck, "FOUND", {})
    monkeypatch.setattr(selfcheck, "_source", lambda: "changed")
    selfcheck.require("k", check)
    assert len(runs) == 3
    assert len(list(checked.rglob("kernels-*.txt"))) == 2


@pytest.mark.parametrize("error", [0.3, float("nan"), float("inf")])
def test_what_is_wrong_is_refused_once_and_tried_again_by_the_next_process(
    error: float, checked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, runs = counted(error)
    for processes in (1, 2):
        with pytest.warns(RuntimeWarning, match="the kernel k is off by"), pytest.raises(NotImplementedError):
            selfcheck.require("k", check)
        with pytest.raises(NotImplementedError, match="off by"):
            selfcheck.require("k", check)
        assert len(runs) == processes
        monkeypatch.setattr(selfcheck, "FOUND", {})
    assert not checked.exists()


@pytest.mark.usefixtures("checked")
def test_a_mistake_of_ours_is_seen_and_the_compilers_is_not() -> None:
    def broken(failure: Exception) -> float:
        raise failure

    with pytest.raises(AttributeError):
        selfcheck.require("a", functools.partial(broken, AttributeError("typo")))
    for name, failure in (("b", jax.errors.JaxRuntimeError("out of registers")), ("c", AttributeError("no such op"))):
        with pytest.warns(RuntimeWarning, match=f"{name} does not compile"), pytest.raises(NotImplementedError):
            selfcheck.require(name, functools.partial(broken, failure), interface=name == "c")


def test_a_cache_that_cannot_be_written_costs_time_alone(checked: Path) -> None:
    checked.write_text("a file, not a folder")
    check, runs = counted(1e-3)
    selfcheck.require("k", check)
    assert runs


@pytest.mark.usefixtures("checked")
def test_a_kernel_that_checks_itself_does_not_wait_for_itself() -> None:
    runs: list[int] = []

    def check() -> float:
        runs.append(1)
        selfcheck.require("k", check)
        return 0.0

    threads = [threading.Thread(target=selfcheck.require, args=("k", check), daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert len(runs) == 1


def test_elsewhere_nothing_is_checked() -> None:
    selfcheck.require("k", lambda: 1 / 0)
    assert "k" not in selfcheck.FOUND


# --- the checks themselves ------------------------------------------------------------------------------------------

QUICK: dict[str, Callable[[], None]] = {
    "rope": rope_pallas.verify,
    "embedding (4 bits)": functools.partial(embedding.verify, 4),
    "embedding (8 bits)": functools.partial(embedding.verify, 8),
}
THOROUGH: dict[str, Callable[[], None]] = {
    "Mamba2 step": ssd.verify,
    "decode attention": decode_pallas.verify,
    "fused read and write (tiles)": functools.partial(fused.verify, "tiles"),
    "fused read and write (plain)": functools.partial(fused.verify, "plain"),
}


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("kernel", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in THOROUGH)])
def test_each_kernel_passes_its_check(kernel: str) -> None:
    (QUICK | THOROUGH)[kernel]()
    assert {kernel: None} == selfcheck.FOUND


@pytest.mark.usefixtures("checked")
def test_a_wrong_rotation_goes_to_the_reference_and_is_listed(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    turn = rope_pallas._turn
    monkeypatch.setattr(rope_pallas, "_turn", lambda arrays, *rest: turn(tuple(x * 1.1 for x in arrays), *rest))
    monkeypatch.setattr(dispatch, "REFUSALS", {})
    monkeypatch.setenv(dispatch.VARIABLE, "pallas")
    x = jnp.asarray(rng.standard_normal((1, 2, 3, 2, 4)), jnp.float32)
    args = x, jnp.arange(2, dtype=jnp.int32)[None], jnp.ones((3, 2))
    with pytest.warns(RuntimeWarning, match="the kernel rope is off by"):
        got = rope(*args)
    np.testing.assert_array_equal(got, rope(*args, implementation="reference"))
    [refusal] = dispatch.REFUSALS
    assert refusal[:2] == ("rope", "pallas")
    assert "off by 0.1" in refusal.reason
