"""The benchmark command: its plan, rows and tables, what it refuses, and that one model is held at a time."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests import published, tiny
from tests.ahead_of_time import ahead_of_time  # noqa: F401  a fixture
from tests.commands import exit_code
from uniql_jax import config as model_config
from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.commands import benchmark as benchmark_command
from uniql_jax.counting import parameter_count
from uniql_jax.errors import UserError
from uniql_jax.evaluation import benchmark, benchmark_report, random_model, timing
from uniql_jax.evaluation.bench import Bench
from uniql_jax.evaluation.timing import Timing

pytestmark = pytest.mark.usefixtures("ahead_of_time")
WORK = ("--prompt-len", 8, "--gen-len", 3, "--repeats", 2)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(tiny.HF))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "model", np.random.default_rng(12))


@pytest.fixture
def small_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "COPY_BYTES", {jax.default_backend(): 2**20})


@pytest.fixture
def runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nothing is to be made or measured")

    for name in ("random_model", "load", "copy_bandwidth"):
        monkeypatch.setattr(benchmark, name, fail)
    monkeypatch.setattr(benchmark.Bench, "__init__", fail)


command = functools.partial(exit_code, benchmark_command.main)


def test_everything_of_a_config(
    config: Path, tmp_path: Path, small_copy: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    assert command("--config", config, "--prune-rates", "0.2", *WORK, "--json", out) == 0
    printed, bar = capsys.readouterr()
    assert "benchmark" in bar
    found = json.loads(out.read_text())
    assert found["environment"]["command"].startswith("python -m uniql_jax.benchmark --config tiny.json")
    assert str(tmp_path) not in out.read_text()
    assert found["settings"] | {"batch_size": 1, "prompt_len": 8, "padded_prompt_len": 16} == found["settings"]
    dense, small = found["rows"]
    assert [row["prune_rate"] for row in found["rows"]] == [None, 0.2]
    assert [row["bits"] for row in found["rows"]] == [32, 4]  # a CPU's dense baseline is float32, and says so
    assert dense["name"] == "dense float32"
    assert dense["weight_bytes"] > 4 * small["weight_bytes"]
    assert dense["cache_bytes"] > small["cache_bytes"]
    assert small["times_smaller"] == 2 * parameter_count(tiny.config()) / small["weight_bytes"]
    assert "speedup" not in dense
    speed = found["copy_bandwidth"]["median"]
    for row in found["rows"]:
        for key in benchmark_report.TIMES:
            assert 0 < row[key]["low"] <= row[key]["median"] <= row[key]["high"]
            assert row[key]["repeats"] == 2
        assert set(row["programs"]) == {"prefill", "step", "loop"}
        assert row["compile_seconds"] == sum(p["compile_seconds"] for p in row["programs"].values()) > 0
        assert row["memory_bytes"] >= row["weight_bytes"] + row["cache_bytes"]
        assert row["floor_seconds"] == row["step_bytes"] / speed
        assert row["floor_fraction"] == row["floor_seconds"] / row["tpot_loop"]["median"]
        assert row["tokens_per_second"] == 1 / row["tpot_loop"]["median"]
        assert f"{1e3 * row['ttft']['median']:.4g} (" in printed
    assert set(small["speedup"]) == set(benchmark_report.TIMES)
    assert small["speedup"]["ttlt"] == dense["ttlt"]["median"] / small["ttlt"]["median"]
    assert f"{small['speedup']['tpot_loop']:.2f}" in printed
    # the plan comes first, and says what the CPU does
    plan = printed.index("needs at least")
    assert printed.index("what a CPU computes in") < plan < printed.index("TTFT")
    assert "padded to 16" in printed


def test_a_checkpoint(folder: Path, tmp_path: Path, small_copy: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own weights at the rates asked for, and only what was asked for."""
    out = tmp_path / "found.json"
    argv = ["--ckpt", folder, "--prune-rates", "0.25", "--no-dense", *WORK, "--batch-size", 2, "--json", out]
    assert command(*argv, "--tpot") == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["weight_bytes"] == open_checkpoint(folder).weight_bytes(0.25)
    assert row["tokens_per_second"] == 2 / row["tpot_loop"]["median"]
    assert not {"ttft", "ttlt", "speedup"} & set(row)
    assert "TTFT" not in capsys.readouterr().out
    assert (
        json.loads(out.read_text())["model"] | {"name": "model", "weights": "checkpoint", "bits": 32}
        == (json.loads(out.read_text())["model"])
    )


def test_sizes_within_budgets(folder: Path, runs_nothing: None, tmp_path: Path) -> None:
    """The least pruning that fits each, after the rates that were named, if any."""
    out, size = tmp_path / "found.json", open_checkpoint(folder).weight_bytes
    limits = f"{size(0.1)},{size(0.3)}"
    sizes = ("--ckpt", folder, "--size", "--no-dense", *WORK, "--json", out)
    assert command(*sizes, "--memory-budget", limits) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["memory_budget"] for row in rows] == [size(0.1), size(0.3)]
    for row, limit in zip(rows, (size(0.1), size(0.3)), strict=True):
        assert size(row["prune_rate"]) <= limit < size(row["prune_rate"] - 0.001)
    assert command(*sizes, "--prune-rates", "0", "--memory-budget", size(0.3), "--overwrite") == 0
    assert ["memory_budget" in row for row in json.loads(out.read_text())["rows"]] == [False, True]


def test_sizes_alone_run_nothing(runs_nothing: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 8 billion parameters, where nothing else would fit; with an output that is there already."""
    out = tmp_path / "found.json"
    argv = ["--config", "llama-3.1-8b", "--size", "--json", out, "--prune-rates", "0,0.35"]
    assert command(*argv) == 0
    dense, full, small = json.loads(out.read_text())["rows"]
    assert full["times_smaller"] == pytest.approx(3.88, abs=0.01)
    assert small["kept_fraction"] == pytest.approx(0.65, abs=0.001)
    # keys and values of 1,536 slots, for 1,024 + 128 tokens, 32 layers, 8 heads of 128, both; float32 on a CPU
    assert dense["cache_bytes"] == full["cache_bytes"] == 1536 * 32 * 8 * 128 * 2 * 4
    assert "programs" not in full
    assert json.loads(out.read_text())["copy_bandwidth"] is None
    assert "3.88" in capsys.readouterr().out
    assert command(*argv) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert command(*argv, "--overwrite", "--bits", 8, "--no-dense") == 0
    full, small = json.loads(out.read_text())["rows"]
    assert full["times_smaller"] == pytest.approx(1.97, abs=0.01)


@pytest.mark.parametrize("name", sorted(published.ALL))
def test_sizes_of_every_published_config(name: str, runs_nothing: None, tmp_path: Path) -> None:
    """No weights are there, and none are asked for."""
    out = tmp_path / "found.json"
    assert command("--config", name, "--size", "--json", out, "--prune-rates", "0,0.35") == 0
    found = json.loads(out.read_text())
    dense, full, small = found["rows"]
    assert found["model"]["parameters"] == parameter_count(model_config.from_hf(published.ALL[name]))
    assert dense["weight_bytes"] == pytest.approx(4 * found["model"]["parameters"], rel=0.01)
    assert 3.5 < full["times_smaller"] < 4 < small["times_smaller"]
    assert small["kept_fraction"] == pytest.approx(0.65, abs=0.01)
    assert small["cache_bytes"] < full["cache_bytes"] == dense["cache_bytes"]


def test_one_model_at_a_time(small_copy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the smallest up, and nothing is held when the next one is made, nor at the end."""
    held: list[tuple[float | None, int]] = []
    real = random_model.random_model

    def live() -> int:
        return sum(array.nbytes for array in jax.live_arrays())

    def make(config: Any, bits: int, rate: float = 0.0, **more: Any) -> Any:
        held.append((rate if bits == 4 else None, live()))
        return real(config, bits, rate, **more)

    class Stub(Bench):
        def ttft(self) -> Timing:
            return Timing(1.0, 1.0, 1.0, 1)

        tpot_step = tpot_loop = ttlt = ttft

    monkeypatch.setattr(benchmark, "random_model", make)
    monkeypatch.setattr(benchmark, "Bench", Stub)
    before = live()
    config = tiny.config()
    subject = benchmark.Subject(
        "tiny", config, random_model.make_plan(config, None), 4, lambda r: make(config, 4, r), True
    )
    found = benchmark.benchmark(subject, [0.0, 0.2], prompt_len=16, gen_len=4)
    assert [rate for rate, _ in held] == [0.2, 0.0, None]
    smallest = found["rows"][2]["weight_bytes"]
    assert max(size for _, size in held) - before < smallest / 4
    assert live() - before < smallest / 4


def timed(loop: Timing) -> dict[str, Any]:
    return {
        "weight_bytes": 100,
        "cache_bytes": 10,
        "step_bytes": 60,
        "tpot_step": loop.scaled(2),
        "tpot_loop": loop,
        "programs": {"loop": (1.5, 300), "step": (2.5, None)},
        "device_peak_bytes": None,
    }


def test_a_rate_that_is_slower_than_the_one_below_is_shown() -> None:
    """In the table, in a line of its own and in the rows; whether the spreads overlap as well."""
    names: list[float | None] = [None, 0.0, 0.15, 0.25, 0.35]
    medians = [8.0, 4.0, 5.0, 4.9, 5.0]
    found = [benchmark.Variant(f"row {rate}", rate, 4, 1.0, 100, 10, lambda: pytest.fail("made")) for rate in names]
    measured: dict[str, Any] = {
        variant.name: timed(Timing(median, median - 0.2, median + 0.2, 5))
        for variant, median in zip(found, medians, strict=True)
    }
    measured["copy"] = Timing(30.0, 20.0, 40.0, 5)
    rows = benchmark_report.rows(found, measured, 400, 3)
    assert [row.get("slower_than") for row in rows] == [None, None, 0.0, None, 0.25]
    assert [row.get("slower_by_more_than_spread") for row in rows] == [None, False, True, False, False]
    assert rows[1]["speedup"] == {"tpot_step": 2.0, "tpot_loop": 2.0}
    assert rows[1]["floor_seconds"] == 2.0
    assert rows[1]["floor_fraction"] == 0.5
    assert rows[1]["tokens_per_second"] == 0.75
    assert rows[1]["compile_seconds"] == 4.0
    assert rows[1]["memory_bytes"] == 300
    assert rows[1]["times_smaller"] == 4.0
    text = benchmark_report.report({"rows": rows, "copy_bandwidth": {"median": 30e9, "low": 20e9, "high": 40e9}})
    assert "row 0.15: SLOWER than rate 0; prefer" in text
    assert "row 0.35: SLOWER than rate 0.25 (within the spread)" in text
    assert text.count("SLOWER") == 4
    assert "30 (20-40) GB/s" in text
    json.dumps(rows, allow_nan=False)


def test_what_cannot_fit_is_refused_first(
    config: Path, runs_nothing: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    subject = benchmark.config_subject(str(config), 4, 0)
    dense, full = benchmark.variants(subject, [0.0], True, 1, 16 + 3, 0)
    argv = ["--config", config, *WORK, "--prune-rates", "0"]
    monkeypatch.setattr(benchmark, "memory_limit", lambda: dense.weight_bytes)
    assert command(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "--no-dense" in err
    monkeypatch.setattr(benchmark, "memory_limit", lambda: full.weight_bytes)
    assert command(*argv, "--no-dense") == 2
    assert "rate 0 needs" in capsys.readouterr().err
    assert command(*argv, "--size") == 0
    benchmark.refuse_too_large([dense, full], None)


def test_a_device_that_runs_out_of_memory(
    config: Path, small_copy: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes"]

    def full(*args: Any) -> Any:
        raise jax.errors.JaxRuntimeError(words[0])

    monkeypatch.setattr(benchmark.Bench, "ttft", full)
    argv = ["--config", config, *WORK, "--prune-rates", "0.1", "--no-dense", "--ttft"]
    assert command(*argv) == 2
    assert "out of memory at rate 0.1" in capsys.readouterr().err
    words[0] = "INTERNAL: something of ours"
    with pytest.raises(jax.errors.JaxRuntimeError, match="ours"):
        benchmark_command.main([str(a) for a in argv])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--config", "llama-9-9b"], "llama-3.1-8b"),
        (["--ckpt", "nowhere"], "nowhere"),
        (["--ckpt", "FOLDER", "--bits", "4"], "--bits"),
        (["--ckpt", "FOLDER", "--config", "llama-2-7b"], "not allowed with"),
        ([], "required"),
        (["--config", "CONFIG", "--bits", "5"], "5"),
        (["--config", "CONFIG", "--prune-rates", "0,0.9"], "prune rate must be"),
        (["--config", "CONFIG", "--batch-size", "0"], "at least 1"),
        (["--config", "CONFIG", "--repeats", "0"], "at least 1"),
        (["--config", "CONFIG", "--gen-len", "1"], "--gen-len"),
        (["--config", "CONFIG", "--prompt-len", "200", "--gen-len", "57"], "exceed the model's 256"),
        (["--config", "CONFIG", "--json", "no/such/folder/rows.json"], "no/such/folder"),
        (["--config", "CONFIG", "--compilation-cache", "CONFIG"], "tiny.json"),
        (["--config", "CONFIG", "--seed", "-1"], "at least 0"),
    ],
)
def test_command_refuses(
    folder: Path,
    config: Path,
    runs_nothing: None,
    more: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = [{"FOLDER": folder, "CONFIG": config}.get(word, word) for word in more]
    assert command(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


def test_an_unsorted_checkpoint_has_no_rates(folder: Path, tmp_path: Path, runs_nothing: None) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    found = json.loads((tmp_path / "config.json").read_text())
    found["uniql"]["plan"] = None
    (tmp_path / "config.json").write_text(json.dumps(found))
    argv = ["--ckpt", str(tmp_path), "--size", "--prompt-len", "8"]
    with pytest.raises(UserError, match="never sorted"):
        benchmark_command.main(argv)
    benchmark_command.main([*argv, "--prune-rates", "0"])


def test_one_token_answers_have_a_first_token(
    config: Path, small_copy: None, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--config", config, "--prompt-len", 8, "--gen-len", 1, "--repeats", 1, "--prune-rates", "0", "--no-dense"]
    assert command(*argv, "--ttft") == 0
    assert "TPOT" not in capsys.readouterr().out.split("needs at least")[1]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--help") == 0
    text = capsys.readouterr().out
    for word in ("examples:", "--config llama-3.1-8b", "nemotron-h-8b", "TPOT is", "--no-dense", "(default: 1024)"):
        assert word in text


COMPILE_TWICE = """
import importlib
import sys
from pathlib import Path
benchmark, generate = (importlib.import_module(f"uniql_jax.commands.{name}") for name in ("benchmark", "generate"))
cache, folder = Path(sys.argv[1]), sys.argv[2]
benchmark.main(["--ckpt", folder, "--ttft", "--no-dense", "--prune-rates", "0", "--prompt-len", "16", "--gen-len", "3",
                "--repeats", "1", "--compilation-cache", str(cache)])
first = len(list(cache.iterdir()))
generate.main(["--ckpt", folder, "--prompt", "Once", "--max-new-tokens", "5", "--compilation-cache", str(cache)])
print("programs", first, len(list(cache.iterdir())))
"""


def test_compiled_programs_are_kept(folder: Path, tmp_path: Path) -> None:
    """By both commands that compile for long; in a process of its own, since JAX's cache is the process's."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_TWICE, str(tmp_path / "new" / "cache"), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    first, both = map(int, done.stdout.split("programs")[-1].split())
    assert 0 < first < both
