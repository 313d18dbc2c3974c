"""The worker behind benchmarks/kernels.py, on a CPU: it times, and what fails costs its own row."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import kernel_calls, kernel_rows, kernel_table, kernel_work

SHAPE = dict(k=256, n=128, group=128, count=2, contract="last", settings={})


def run(monkeypatch: pytest.MonkeyPatch, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    """What the worker says of each row."""
    for module in (kernel_calls, kernel_rows):
        monkeypatch.setattr(module, "DISTINCT", 1.0)  # few copies: no cache is to be outrun here
    kernel_calls.pool.cache_clear()
    said: list[dict[str, Any]] = []
    kernel_work.work([SHAPE | row for row in rows], 1, True, said.append)
    kernel_calls.pool.cache_clear()
    return [message["row"] for message in said if "row" in message]


def test_the_baseline_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    [row] = run(monkeypatch, dict(kernel="bf16"))
    assert "failed" not in row
    assert row["us"] > 0
    assert row["adds"]  # it has no operand to wait by


def test_a_row_that_fails_costs_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    failed, timed = run(monkeypatch, dict(kernel="mma", settings=dict(sideways=2)), dict(kernel="bf16"))
    assert "sideways" in failed["failed"]
    assert "us" not in failed
    assert timed["us"] > 0


def test_what_is_in_doubt_speaks_for_the_baseline() -> None:
    """An addition that takes 1.6 us after others took 1.0 next to a kernel: so much less is taken off our own rows."""

    def row(kernel: str, us: float, adds: bool = False, k: int = 4096, **settings: Any) -> dict[str, Any]:
        named = dict(kernel=kernel, k=k, n=k, count=1 if k else 0, group=128, contract="first", settings=settings)
        return named | dict(us=us, adds=adds, error=1e-3)

    probes = [row("launch: xla add", 1.6, k=0)]
    probes += [row("launch: mma", us, k=0, by=by) for by, us in (("operand", 5.0), ("add", 6.0))]
    timed = [row("bf16", 20.0, adds=True), row("auto", 8.0, adds=True, order="groups"), row("mma", 9.0, order="groups")]
    table = kernel_table.summarize(probes + timed, 3e12)
    assert [each["net_us"] for each in timed] == [pytest.approx(us) for us in (18.4, 7.0, 9.0)]
    [line] = [line for line in table if line.startswith("4096x4096")]
    assert "2.63x" in line
    assert "auto" in line
    assert kernel_table.summarize(timed, 3e12)  # without probes nothing is taken off
    assert [each["net_us"] for each in timed] == [20.0, 8.0, 9.0]
