"""The time and memory that the plan gives recovery, against runs that were recorded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import published
from tests.records import config_of
from uniql_jax import config as model_config
from uniql_jax.compression import estimate, estimate_training
from uniql_jax.compression.contract import RecoveryData
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.evaluation.random_model import read_config
from uniql_jax.train.examples import from_windows, split
from uniql_jax.train.placement import memory_bytes
from uniql_jax.train.settings import RecoverySettings

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
H100, H200 = 700e12, 690e12
IN_A_KERNEL = {"ae1ae21d", "7187337a", "6a5074bc", "027eb664", "f94ca4ed"}
"""Passes, by their hash, that rounded groups in one kernel before the plan knew of it."""
FIELDS = {field.name for field in dataclasses.fields(RecoverySettings)}


@pytest.mark.parametrize(
    ("file", "row", "speed"),
    [("long-h100", "all rates", H100), ("every-weight-h200", "all rates", H200),
     ("every-weight-h200", "all rates, tuned", H200)],
)  # fmt: skip
def test_a_small_model(file: str, row: str, speed: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2 on one GPU, in examples of 512 tokens, 128 of them for validation."""
    run = json.loads((RESULTS / f"recovery-smollm2-{file}.json").read_text())["training_rows"][row]
    settings = RecoverySettings(**{name: value for name, value in run["options"].items() if name in FIELDS})
    assert seconds("smollm2-135m", settings, 512, speed, monkeypatch) == pytest.approx(run["seconds"], rel=0.3)


@pytest.mark.parametrize(
    ("file", "variant", "devices"),
    [("llama-3.1-8b-h100", "1 products", 1), ("llama-3.1-8b-rank64-two-h200", "1 products", 2)],
)
def test_a_step_of_a_large_model(file: str, variant: str, devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.loads((RESULTS / f"train-step-{file}.json").read_text())
    rank, batch = record["options"]["rank"], record["batch"]
    settings = RecoverySettings(rank=rank, batch=batch, steps=1000, evaluations=1, remat="products", compute="bfloat16")
    monkeypatch.setattr(estimate_training, "data_mesh", lambda rows: np.zeros(devices))
    speed = record["product_flops_a_second"]
    found = seconds("llama-3.1-8b", settings, record["length"], speed, monkeypatch) / 1000
    assert found == pytest.approx(record["variants"][variant]["median_seconds"], rel=0.3)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("compress-*-h200.json")), ids=lambda path: path.stem)
def test_the_time_that_recorded_passes_took(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of which the machine's pace was recorded as well, with recovery and without."""
    record = json.loads(path.read_text())
    settings, config = record["settings"], config_of(record["settings"])
    for row in record["rows"]:
        if "pace" not in row["planned"] or settings["resume"]:
            continue
        found = row["planned"]["pace"]
        found.setdefault("rounded", estimate.GPU_ROUNDED if row["sha256"][:8] in IN_A_KERNEL else found["columns"])
        pace = estimate.Pace(**found)
        # measured once then, and up to seven times too slow where another thread began
        pace = pace._replace(host=max(pace.host, 4e10))
        tokens, interval = settings["windows"] * row["length"], row["planned"]["interval"]
        planned = estimate.seconds(estimate.work(config, CompressionSettings(), tokens, interval), pace)
        if steps := settings.get("recover"):
            lora = RecoverySettings(rank=64, batch=16, steps=steps, compute="bfloat16", remat="products")
            windows = from_windows(np.zeros((settings["windows"], row["length"]), np.int32), "")
            halves = split(windows, lora.held_share, lora.held_most, lora.seed)
            speed = pace.products / estimate.PRODUCTS_SHARE
            monkeypatch.setattr(estimate_training, "product_speed", lambda *_, speed=speed: speed)
            monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
            monkeypatch.setattr(estimate_training, "data_mesh", lambda rows: np.zeros(1))
            planned += estimate_training.training_seconds(config, RecoveryData(*halves, lora))
        assert planned == pytest.approx(row["seconds"], rel=0.3)


@pytest.mark.parametrize(
    ("file", "devices"), [("llama-3.1-8b-h100", 1), ("llama-3.1-8b-rank64-two-h200", 2)],
)  # fmt: skip
def test_the_memory_of_a_step(file: str, devices: int) -> None:
    """Of every way that was recorded to keep activations or to compute them again."""
    record = json.loads((RESULTS / f"train-step-{file}.json").read_text())
    for variant, found in record["variants"].items():
        parts, remat = variant.split()
        settings = RecoverySettings(
            rank=record["options"]["rank"], batch=record["batch"], accumulate=int(parts), remat=remat,
            compute="bfloat16",
        )  # fmt: skip
        planned = memory_bytes(read_config("llama-3.1-8b"), settings, record["length"], devices)
        assert planned == pytest.approx(found["program_bytes"], rel=0.2), variant


def seconds(name: str, settings: RecoverySettings, length: int, speed: float, monkeypatch: pytest.MonkeyPatch) -> float:
    """What the plan would have said on a GPU of this speed."""
    monkeypatch.setattr(estimate_training, "product_speed", lambda *_: speed)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    examples = from_windows(np.zeros((4096, length), np.int32))
    data = RecoveryData(examples, examples.take(np.arange(128)), settings)
    return estimate_training.training_seconds(model_config.from_hf(published.ALL[name]), data)
