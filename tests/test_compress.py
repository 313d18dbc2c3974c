"""The compress command: its plan is right, its options reach the pass, and a finished run is not run again."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import published, tiny
from tests.commands import exit_code
from uniql_jax import config as model_config
from uniql_jax import console, counting
from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.commands import compress as command
from uniql_jax.compression import compress, describe, estimate, own_windows, pipeline
from uniql_jax.compression.settings import PRECISIONS, CompressionSettings
from uniql_jax.convert.source import open_source
from uniql_jax.errors import UserError

QUICK = ("--rounding", "nearest", "--no-rotate")
Folder = Callable[[str], Path]


@pytest.fixture
def calib(tmp_path: Path, rng: np.random.Generator) -> Path:
    path = tmp_path / "calib.npy"
    np.save(path, rng.integers(3, 256, (8, 32)).astype(np.int32))
    return path


_run = functools.partial(exit_code, command.main)


def test_a_run_plans_works_and_says_what_next(
    hf_folder: Folder, calib: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = ("--ckpt", hf_folder("llama-2-7b"), "--out", out, "--calib", calib, "--calib-windows", "8", *QUICK)
    assert _run(*argv, "--calib-length", "32", "--uniform", "--seed", "3", "--precision", "tf32") == 0
    shown = capsys.readouterr().out
    checkpoint = open_checkpoint(out)
    assert (
        checkpoint.meta["options"]
        | {"rounding": "nearest", "rotate": False, "plan": "uniform", "seed": 3, "precision": "tf32"}
        == (checkpoint.meta["options"])
    )
    assert "8 windows of 32 tokens" in checkpoint.meta["provenance"]["calibration"]
    for row in ("model", "weights", "cuts", "calibration", "checkpoint", "disk", "memory", "time"):
        assert re.search(rf"^{row} +\S", shown, re.MULTILINE), row
    assert "note" in shown  # a tiny model is cut finer than hardware likes
    for rate in command.RATES:
        assert console.format_bytes(checkpoint.weight_bytes(rate)) in shown
    for name in ("uniql_jax.evaluate", "uniql_jax.generate", "uniql_jax.export"):
        assert f"python -m {name}" in shown
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calib.npy", "out"]

    before = (out / "model.safetensors").stat().st_mtime_ns
    assert _run(*argv, "--calib-length", "32", "--uniform", "--seed", "3", "--precision", "tf32", "--resume") == 0
    assert "nothing to resume" in capsys.readouterr().out
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    assert _run(*argv, "--calib-length", "32", "--seed", "4", "--resume") == 2  # another run's result stays
    error = capsys.readouterr().err
    assert "--overwrite" in error
    assert "setting seed" in error
    assert 'setting precision ("tf32" -> "bf16")' in error


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU multiplies as it is asked to")
@pytest.mark.parametrize("name", PRECISIONS)
def test_a_cpu_multiplies_in_float32_at_any_precision(name: str, rng: np.random.Generator) -> None:
    x, y = (rng.standard_normal((33, 65)).astype(np.float32) for _ in range(2))
    with jax.default_matmul_precision(pipeline.matmul_precision(CompressionSettings(precision=name))):
        found = jnp.asarray(x) @ jnp.asarray(y).T
    exact = x.astype(np.float64) @ y.T.astype(np.float64)
    assert np.abs(found - exact).max() < 1e-5  # TF32 would miss it by 1e-3


@pytest.mark.slow
def test_recovery_does_what_the_plan_says(
    hf_folder: Folder, calib: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = [
        "--ckpt", hf_folder("llama-2-7b"), "--out", out, "--calib", calib, "--calib-length", "32", "--recover", calib,
        "--recover-rank", "0", "--recover-length", "32", "--recover-batch", "4", "--recover-steps", "3",
        "--recover-adapt", "2", "--recover-distill", "0.9", "--recover-rates", "uniform", "--recover-tune", "2",
    ]  # fmt: skip
    assert _run(*argv) == 0
    shown = capsys.readouterr().out
    assert "2 at rate 0, then 3 steps of 4 x 32 tokens" in shown
    assert "every weight" in shown
    assert "weighing 90%" in shown
    assert "2 steps more after quantizing" in shown
    provenance = open_checkpoint(out).meta["provenance"]
    first, second = (provenance[name]["options"] for name in ("recovery", "tuning"))
    assert (first["adapt"], first["teacher"], first["batch"], first["rates"]) == (2, "original", 4, "uniform")
    assert (second["adapt"], second["teacher"], second["steps"], second["rank"]) == (0, "rate 0", 2, 0)
    assert _run(*argv, "--resume") == 0
    assert "nothing to resume" in capsys.readouterr().out
    assert _run(*argv, "--resume", "--recover-steps", "4") == 2  # that is another run
    assert "--overwrite" in capsys.readouterr().err


def test_an_unfinished_run_in_the_way(
    hf_folder: Folder, calib: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "manifest.json").write_text("{}")
    assert _run("--ckpt", hf_folder("llama-2-7b"), "--out", tmp_path / "out", "--calib", calib) == 2
    assert "--resume" in capsys.readouterr().err


def test_without_a_tokenizer_text_is_refused(
    hf_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for calib in ((), ("--calib", __file__)):
        assert _run("--ckpt", hf_folder("llama-2-7b"), "--out", tmp_path / "out", *calib) == 2
        assert ".npy" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (("--calib-windows", "0"), "at least 1"),
        (("--calib-length", "1"), "at least 2"),
        (("--refit", "1.5"), "from 0 to 1"),
        (("--refit", "1"), "less than 1"),
        (("--mlp-score", "luck"), "luck"),
        (("--plan", "loss", "--uniform"), "not allowed"),
        (("--recover", "alpaca"), "alpaca"),
        (("--recover-tune", "5"), "goes with --recover"),
        (("--recover-rank", "8"), "--recover-rank goes with --recover"),
        (("--recover-lr", "1e-3"), "goes with --recover"),
        (("--recover", "alpaca", "--recover-rates", "often"), "sandwich"),
        (("--recover", "alpaca", "--recover-adapt", "-1"), "at least 0"),
        (("--recover", "alpaca", "--recover-tune", "5", "--bits", "16"), "4 or 8 bits"),
        (("--seed", "-1"), "at least 0"),
    ],
)
def test_bad_arguments(
    argv: tuple[str, ...], word: str, hf_folder: Folder, calib: Path, tmp_path: Path, capsys: Any
) -> None:
    assert _run("--ckpt", hf_folder("llama-2-7b"), "--out", tmp_path / "out", "--calib", calib, *argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert word in error


def test_text_becomes_windows_that_the_model_can_read(
    hf_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the tokenizer next to the weights; the length stops at the model's own limit, and the plan says so."""
    config = published.shrink(published.LLAMA_2_7B, max_position_embeddings=16, vocab_size=tiny.VOCAB)
    source = open_source(hf_folder("llama-2-7b"))
    text = tmp_path / "text.txt"
    text.write_text("The people kept the peace.\n" * 200)
    source = dataclasses.replace(
        source,
        config=model_config.from_hf(config),
        write_side_files=lambda folder: tiny.tokenizer().save_pretrained(str(folder)),
    )
    found = compress.calibration_windows(source, [str(text)], 5, 512, 0)
    assert found.tokens.shape == (5, 16)
    assert "limit is 16" in found.description
    monkeypatch.setattr(compress.data, "DEFAULT_CALIBRATION", ("docs:safetensors",))
    default = compress.calibration_windows(source, [], 4, 16, 0)
    assert default.tokens.shape == (4, 16)
    assert "--calib" in default.description
    assert "docs:safetensors" in default.description


@pytest.mark.parametrize(
    ("specs", "own", "count"), [(["own"], 6, 6), (["own:4"], 4, 4), (["own", "TEXT"], 3, 6), (["own:5", "TEXT"], 5, 6)]
)
def test_windows_that_the_model_will_write(
    hf_folder: Folder, tmp_path: Path, specs: list[str], own: int, count: int
) -> None:
    source = open_source(hf_folder("llama-2-7b"))
    text = tmp_path / "text.npy"
    np.save(text, np.full((50, 16), 7, np.int32))
    found = compress.calibration_windows(source, [str(text) if s == "TEXT" else s for s in specs], 6, 16, 0)
    assert found.tokens.shape == (count, 16)
    assert not found.tokens[:own].any()
    assert (found.tokens[own:] == 7).all()
    assert found.own is not None
    assert (found.own.windows, found.own.length) == (own, 16)
    assert "writes itself" in found.description


@pytest.mark.parametrize(
    ("specs", "said"), [(["own:6", "text.npy"], "leave none for"), (["own:0"], "from 2 to"), (["own", "own:2"], "once")]
)
def test_own_windows_that_cannot_be(hf_folder: Folder, specs: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        compress.calibration_windows(open_source(hf_folder("llama-2-7b")), specs, 6, 16, 0)


def test_one_window_is_not_shared(hf_folder: Folder) -> None:
    with pytest.raises(UserError, match="1 windows"):
        compress.calibration_windows(open_source(hf_folder("llama-2-7b")), ["own", "text.npy"], 1, 16, 0)


def test_calibration_on_what_the_model_writes(hf_folder: Folder, calib: Path, tmp_path: Path) -> None:
    """The same as from a file of it; killed while it is written, and resumed, the same bytes."""
    ckpt, out, again = str(hf_folder("llama-2-7b")), tmp_path / "out", tmp_path / "again"
    said: list[str] = []
    run = functools.partial(compress.compress, ckpt, calib=["own:5", str(calib)], calib_windows=8, calib_length=16)
    run(out, say=said.append)
    assert "5 windows of 16 tokens that the model writes itself" in said[0]

    def killed(items: Any, stage: str) -> Any:
        for item in items:
            yield item
            if stage == "sort":
                raise InterruptedError

    with pytest.raises(InterruptedError):
        run(again, progress=killed)
    with pytest.raises(UserError, match="own text setting windows"):
        run(again, resume=True, calib=["own:4", str(calib)])
    run(again, resume=True)
    name = next(path.name for path in out.glob("*.safetensors"))
    assert (out / name).read_bytes() == (again / name).read_bytes()
    source = open_source(ckpt)
    found = compress.calibration_windows(source, ["own:5", str(calib)], 8, 16, 0)
    assert found.own is not None
    rows = own_windows.write(source, found.own, tmp_path / "rows", lambda items, _: items)
    assert rows.any()
    whole = np.concatenate([rows, found.tokens[5:]]).astype(np.int32)
    pipeline.compress(source, tmp_path / "file", whole, CompressionSettings())
    assert (out / name).read_bytes() == (tmp_path / "file" / name).read_bytes()


@pytest.mark.parametrize("name", sorted(published.ALL))
def test_estimates_of_real_models(name: str) -> None:
    """Sizes known without weights: 4 bits are about a quarter of 16, a rate takes its share of the layers."""
    config = model_config.from_hf(published.ALL[name])
    four, sixteen = CompressionSettings(bits=4), CompressionSettings(bits=16)
    small, large = estimate.estimated_bytes(config, four), estimate.estimated_bytes(config, sixteen)
    assert 0.25 < small / large < 0.32
    params = counting.parameter_count(config)
    assert large == pytest.approx(2 * params, rel=0.01)
    cut = estimate.estimated_bytes(config, sixteen) - estimate.estimated_bytes(config, sixteen, 0.35)
    assert cut == pytest.approx(0.35 * 2 * counting.prunable_count(config), rel=0.01)
    assert 0.4 < counting.prunable_count(config) / params < 1
    packed, dense = estimate.work(config, four, 65536), estimate.work(config, sixteen, 65536)
    assert packed.solves > dense.solves
    assert packed.rounded > dense.rounded == 0
    assert packed.products > dense.products > 2 * params * 65536 * 0.4
    pace = estimate.Pace(1e14, 1e13, 1e-5, 1e-6, 1e10, 1e10, 1e9, 10.0)
    times = [estimate.seconds(estimate.work(config, four, tokens), pace) for tokens in (65536, 262144)]
    assert 0 < times[0] < times[1] < 4 * times[0]
    parts = estimate.memory_parts(config, four, 512, 4096)
    assert all(size > 0 for size in parts.values())
    assert sum(parts.values()) < 60e9


@pytest.mark.parametrize("bits", [4, 16])
def test_estimated_bytes_are_those_of_the_file(
    bits: int, hf_folder: Folder, tmp_path: Path, rng: np.random.Generator
) -> None:
    source = open_source(hf_folder("smollm2-135m"))
    options = CompressionSettings(bits=bits, rounding="nearest", scale_search=False, plan="uniform")
    tokens = rng.integers(3, 256, (4, 16)).astype(np.int32)
    report = pipeline.compress(source, tmp_path / "out", tokens, options)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert estimate.estimated_bytes(source.config, options) == pytest.approx(report.bytes, rel=0.02)
    assert estimate.estimated_bytes(source.config, options, 0.35) == pytest.approx(
        checkpoint.weight_bytes(0.35), rel=0.06
    )


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "1 s"), (80, "80 s"), (600, "10 min"), (7200, "2.0 h")])
def test_times_for_people(seconds: float, text: str) -> None:
    assert describe.format_seconds(seconds) == text


def test_a_log_that_cannot_be_written_leaves_nothing(
    hf_folder: Folder, tmp_path: Path, rng: np.random.Generator
) -> None:
    np.save(tmp_path / "calib.npy", rng.integers(3, 256, (2, 16)).astype(np.int32))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="cannot write"):
        compress.compress(
            str(hf_folder("smollm2-135m")), tmp_path / "out", calib=[str(tmp_path / "calib.npy")], calib_windows=2,
            calib_length=16, log=tmp_path / "missing" / "log.jsonl",
        )  # fmt: skip
    assert sorted(tmp_path.iterdir()) == before
