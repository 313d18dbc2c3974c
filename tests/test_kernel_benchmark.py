"""The worker behind benchmarks/kernels.py, on a CPU: it times, and what fails costs its own row."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import kernel_rows, kernel_work

SHAPE = dict(k=256, n=128, group=128, count=2, contract="last", settings={})


def run(monkeypatch: pytest.MonkeyPatch, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    """What the worker says of each row."""
    for module in (kernel_rows, kernel_work):
        monkeypatch.setattr(module, "DISTINCT", 1.0)  # few copies: no cache is to be outrun here
    kernel_work.pool.cache_clear()
    said: list[dict[str, Any]] = []
    kernel_work.work([SHAPE | row for row in rows], 1, True, said.append)
    kernel_work.pool.cache_clear()
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
