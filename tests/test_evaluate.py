"""Perplexity against its definition, the rows of the command, and the plot."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uniql_jax
from tests import tiny
from tests.commands import exit_code
from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.commands import evaluate as evaluate_command
from uniql_jax.errors import UserError
from uniql_jax.evaluation import evaluate, evaluate_report, likelihood, plot
from uniql_jax.model.causal_lm import CausalLM

_forward = jax.jit(lambda model, tokens: model(tokens))
KEYS = {"prune_rate", "source", "metric", "value", "weight_bytes", "kept_fraction"}


def perplexity_by_definition(model: CausalLM, windows: np.ndarray) -> float:
    """In float64 from full logits."""
    logits = np.asarray(_forward(model, jnp.asarray(windows)), np.float64)[:, :-1]
    logits -= logits.max(-1, keepdims=True)
    log_chances = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return float(np.exp(-np.take_along_axis(log_chances, windows[:, 1:, None], axis=-1).mean()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "model", np.random.default_rng(12))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "held-out.txt"
    path.write_text("\n".join(tiny.LINES * 6))
    return path


@pytest.mark.parametrize(("count", "batch_size"), [(5, 2), (3, 8)])
def test_perplexity_is_its_definition(
    count: int, batch_size: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when logits come in chunks that do not divide the tokens, and the last batch is not full."""
    monkeypatch.setattr(likelihood, "LOGITS", tiny.VOCAB * 17)
    model = tiny.model(rng)
    windows = rng.integers(0, tiny.VOCAB, (count, 21)).astype(np.int32)
    found = evaluate.perplexity(model, windows, batch_size)
    assert found == pytest.approx(perplexity_by_definition(model, windows), rel=1e-5)
    assert found > 50


def test_progress_counts_batches(rng: np.random.Generator) -> None:
    seen: dict[str, Any] = {}

    def progress(batches: Any, desc: str, total: int) -> Any:
        seen.update(desc=desc, total=total, count=len(batches))
        return batches

    windows = rng.integers(0, tiny.VOCAB, (5, 4)).astype(np.int32)
    evaluate.perplexity(tiny.model(rng), windows, 2, progress, "here")
    assert seen == {"desc": "here", "total": 3, "count": 3}


def test_perplexity_refuses(rng: np.random.Generator) -> None:
    model = tiny.model(rng)
    for shape in ((0, 8), (2, 1)):
        with pytest.raises(UserError, match="windows must be"):
            evaluate.perplexity(model, np.zeros(shape, np.int32))
    model.params["norm"] = model.params["norm"] * np.nan
    with pytest.raises(UserError, match="not finite"):
        evaluate.perplexity(model, np.zeros((1, 4), np.int32))


command = functools.partial(exit_code, evaluate_command.main)


def test_command(folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "rows.json", tmp_path / "curve.png"
    argv = ["--ckpt", folder, "--prune-rates", "0,0.25", "--text", text, "--window", 32, "--batch-size", 3]
    assert command(*argv, "--json", out, "--plot", picture) == 0
    printed = capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert [row["prune_rate"] for row in rows] == [0.0, 0.25]
    checkpoint = open_checkpoint(folder)
    assert checkpoint.plan is not None
    tokenizer = tiny.tokenizer()
    ids = tokenizer(text.read_text())["input_ids"]
    windows = np.asarray(ids[: len(ids) // 32 * 32], np.int32).reshape(-1, 32)
    for row in rows:
        assert set(row) == KEYS
        assert row["source"] == str(text)
        assert row["metric"] == "perplexity"
        rate = row["prune_rate"]
        model = uniql_jax.load(str(folder), rate)
        assert row["value"] == pytest.approx(perplexity_by_definition(model, windows), rel=1e-5)
        assert row["weight_bytes"] == checkpoint.weight_bytes(rate)
        assert row["kept_fraction"] == checkpoint.plan.kept_fraction(rate)
        assert f"{row['value']:.2f}" in printed
    assert rows[1]["weight_bytes"] < rows[0]["weight_bytes"]
    assert "/ rate 0" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    # both outputs are there now
    assert command(*argv, "--json", out) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert command(*argv, "--json", out, "--overwrite", "--max-tokens", 64) == 0


def test_several_texts_and_the_original(
    folder: Path, text: Path, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original is measured on the same windows, and named by a rate of null."""
    from uniql_jax.runtime import loading

    ids = tmp_path / "ids.npy"
    np.save(ids, rng.integers(0, tiny.VOCAB, (4, 16)).astype(np.int32))
    original = tiny.model(rng)
    monkeypatch.setattr(loading, "load_source", lambda ckpt, devices: {"there": original}[ckpt])
    said: list[str] = []
    rows = evaluate.evaluate(
        str(folder), [0.1], [str(text), str(ids)], window=16, max_tokens=64, baseline="there", say=said.append
    )
    assert [(row["prune_rate"], row["source"]) for row in rows] == [
        (None, str(text)),
        (None, str(ids)),
        (0.1, str(text)),
        (0.1, str(ids)),
    ]
    assert len(said) == 2
    windows = np.load(ids)
    assert rows[1]["value"] == pytest.approx(perplexity_by_definition(original, windows), rel=1e-5)
    parameters = sum(p.size for p in _leaves(original.params))
    assert rows[0]["weight_bytes"] == 2 * parameters  # its config says bfloat16
    assert rows[0]["kept_fraction"] == 1.0
    table = evaluate_report.report(rows)
    assert "/ the original" in table
    assert f"{rows[2]['value'] / rows[0]['value']:.3f}" in table
    assert str(ids) in table


def _leaves(tree: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(tree)


def test_windows_are_no_longer_than_the_model_reads(folder: Path, text: Path) -> None:
    said: list[str] = []
    evaluate.evaluate(str(folder), [0], [str(text)], window=1024, max_tokens=256, say=said.append)
    assert "of 256 tokens" in said[0]


@pytest.mark.parametrize(
    ("settings", "length", "says"),
    [
        ({"max_tokens": 100, "window": 256}, 100, "windows of 256 are cut to --max-tokens 100"),
        ({"window": 1024}, 256, "windows of 1024 are cut to the model's limit of 256"),
        ({"window": 64, "max_tokens": 100}, 64, ""),
        ({"max_tokens": 30}, 30, "cut to --max-tokens 30"),
    ],
)
def test_windows_that_are_cut_are_said(
    folder: Path, text: Path, settings: dict[str, int], length: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    shapes: list[tuple[int, ...]] = []
    measure = lambda model, windows, *rest: shapes.append(windows.shape) or 1.0  # noqa: E731
    monkeypatch.setattr(evaluate, "perplexity", measure)
    evaluate.evaluate(str(folder), [0], [str(text)], say=said.append, **settings)
    assert f"of {length} tokens" in said[0]
    assert said[0].endswith(f"{says})") if says else "are cut to" not in said[0]
    [shape] = shapes
    assert shape[1] == length
    assert np.prod(shape) <= settings.get("max_tokens", 10**9)


@pytest.mark.parametrize(
    ("texts", "settings"),
    [([""], {}), ([" "], {}), (["a"], {"asked": [""]}), (["a"], {"window": 1}), (["a"], {"max_tokens": 1}),
     (["a"], {"limit": 0}), (["a"], {"batch_size": 0})],
)  # fmt: skip
def test_what_cannot_be_measured(folder: Path, texts: list[str], settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"empty|at least"):
        evaluate.evaluate(str(folder), [0], texts, **settings)


def test_a_plan_comes_first(folder: Path, text: Path) -> None:
    heard: list[str] = []
    evaluate.evaluate(str(folder), [0.1], [str(text)], window=16, max_tokens=32, say=heard.append, plan=heard.append)
    plan = heard[0]
    for part in (str(folder), "0.1 (", "of weights", str(text), "CPU"):
        assert part in plan
    assert "windows" in heard[1]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--max-tokens", "1"], "--max-tokens"),
        (["--limit", "0"], "at least 1"),
        (["--window", str(10**20)], "from 1 to"),
        (["--batch-size", str(10**12)], "from 1 to"),
        (["--prune-rates", "abc"], "prune rate must be"),
        (["--prune-rates", "0,0.9"], "prune rate must be"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--window", "1"], "--window"),
        (["--limit", "5"], "--tasks"),
        (["--batch-size", "0"], "at least 1"),
        (["--json", "no/such/folder/rows.json"], "no/such/folder"),
        (["--ckpt", "nowhere"], "nowhere"),
    ],
)
def test_command_refuses(
    folder: Path, text: Path, more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--ckpt", folder, "--text", text, *more) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


def test_command_without_a_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--ckpt", folder) == 2
    assert "--text" in capsys.readouterr().err


def test_a_missing_plotting_library_is_said_first(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert command("--ckpt", folder, "--text", text, "--plot", tmp_path / "curve.png") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "uniql-jax[plot]" in err
    assert not (tmp_path / "curve.png").exists()


def test_tokens_without_a_tokenizer(tmp_path: Path, rng: np.random.Generator, text: Path) -> None:
    bare = tiny.checkpoint(tmp_path / "bare", rng, with_tokenizer=False)
    np.save(tmp_path / "ids.npy", rng.integers(0, tiny.VOCAB, (4, 16)).astype(np.int32))
    rows = evaluate.evaluate(str(bare), [0.0], [str(tmp_path / "ids.npy")], window=16)
    assert math.isfinite(rows[0]["value"])
    with pytest.raises(UserError, match="no tokenizer"):
        evaluate.evaluate(str(bare), [0.0], [str(text)], window=16)


def row(rate: float | None, value: float, source: str = "a", size: int = 10**6) -> dict[str, Any]:
    return {
        "prune_rate": rate,
        "source": source,
        "metric": "perplexity",
        "value": value,
        "weight_bytes": size,
        "kept_fraction": 1.0,
    }


def test_what_ratios_are_taken_against() -> None:
    assert plot.reference([row(0.0, 5), row(None, 4)], "a") == (4.0, "the original")
    assert plot.reference([row(0.15, 6), row(0.0, 5)], "a") == (5.0, "rate 0")
    assert plot.reference([row(0.15, 6)], "a") is None
    assert plot.reference([row(None, 4, "b"), row(0.15, 6)], "a") is None


@pytest.mark.parametrize(
    "rows",
    [
        [row(None, 4), row(0.0, 5, size=9 * 10**5), row(0.35, 9, size=6 * 10**5)],
        [row(0.15, 6)],
        [row(0.0, 5), row(0.2, 6), row(0.0, 7, "b"), row(0.2, 8, "b")],
        [row(0.0, 5), row(0.2, 6), row(0.2, 8, "b")],
    ],
)
def test_curves_of_all_kinds_are_drawn(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    plot.rate_curve(rows, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
