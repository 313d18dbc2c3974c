"""What a run may take: batches, streams and intervals follow the limits, or the run is refused before it starts."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.records import config_of
from uniql_jax import elastic
from uniql_jax.compression import budget
from uniql_jax.compression.budget import BATCHES, Budget, lay_out
from uniql_jax.compression.estimate import disk_bytes, stream_bytes
from uniql_jax.compression.settings import CompressionSettings, Resources
from uniql_jax.compression.sorting import layer_statistics, no_statistics
from uniql_jax.counting import activation_floats
from uniql_jax.errors import UserError
from uniql_jax.evaluation.random_model import read_config
from uniql_jax.train.lora import planned
from uniql_jax.train.placement import memory_bytes
from uniql_jax.train.settings import RecoverySettings
from uniql_jax.train.work import state_bytes

GIB = 2**30
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
SETTINGS = CompressionSettings()
MODELS = ("llama-3.1-8b", "qwen2.5-7b", "mamba2-8b", "nemotron-h-8b", "bamba-9b-v2", "smollm2-135m")


@pytest.fixture(params=[None, 80 * GIB], ids=["cpu", "gpu"])
def total(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """A machine with 128 GiB of memory, and the memory of its accelerator."""
    monkeypatch.setattr(budget, "device_limit", lambda: request.param)
    monkeypatch.setattr(budget, "available_host", lambda: 128 * GIB)
    return request.param


def _laid_out(model: str, shape: tuple[int, int] = (128, 2048), free_disk: int | None = None, **limits: int) -> Budget:
    return lay_out(read_config(model), SETTINGS, Resources(**limits), shape, free_disk=free_disk)


@pytest.mark.parametrize("model", MODELS)
def test_a_whole_machine_is_enough(model: str, total: int | None) -> None:
    found = _laid_out(model)
    assert sum(found.device.values()) <= (total or 0)
    assert sum(found.host.values()) <= 128 * GIB
    assert found.batch_tokens in BATCHES
    assert found.interval >= 1
    config = read_config(model)
    segment = found.interval * stream_bytes(config, SETTINGS, 128 * 2048)
    assert found.interval == 1 or segment <= (found.device or found.host)["held streams"]


@pytest.mark.parametrize("model", MODELS)
def test_less_memory_means_smaller_batches_and_fewer_streams(model: str, total: int | None) -> None:
    limit = "max_host_memory" if total is None else "max_device_memory"
    laid = []
    for size in (100, 64, 40, 32, 24, 16, 8, 4, 2, 1):
        with contextlib.suppress(UserError):
            laid.append((size, _laid_out(model, (64, 512), **{limit: size * GIB})))
    assert [size for size, _ in laid] == [100, 64, 40, 32, 24, 16, 8, 4, 2, 1][: len(laid)]
    assert laid
    for (size, more), (_, less) in itertools.pairwise([*laid, laid[-1]]):
        assert sum((more.device or more.host).values()) <= size * GIB
        assert less.batch_tokens <= more.batch_tokens


def test_a_small_gpu_takes_8b(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "device_limit", lambda: 80 * GIB)
    monkeypatch.setattr(budget, "available_host", lambda: 128 * GIB)
    found = _laid_out("llama-3.1-8b", (128, 512), max_device_memory=22 * GIB, max_host_memory=24 * GIB)
    assert sum(found.device.values()) <= 22 * GIB
    assert sum(found.host.values()) <= 24 * GIB


def test_what_cannot_fit_is_refused(total: int | None) -> None:
    limit = "max_host_memory" if total is None else "max_device_memory"
    with pytest.raises(UserError, match="--calib-windows"):
        _laid_out("llama-3.1-8b", **{limit: GIB})
    with pytest.raises(UserError, match="--max-disk"):
        _laid_out("llama-3.1-8b", max_disk=GIB)


def test_more_devices_than_there_are_are_refused(total: int | None) -> None:
    with pytest.raises(UserError, match="--devices 99"):
        _laid_out("smollm2-135m", devices=99)


def test_a_small_disk_means_that_more_is_computed_again(total: int | None) -> None:
    windows = (256, 2048)  # their streams take more of the disk than the layers
    usual = _laid_out("llama-3.1-8b", windows)
    for limits in ({"max_disk": usual.disk - 1}, {"free_disk": usual.disk - 1}):
        found = _laid_out("llama-3.1-8b", windows, **limits)
        assert found.interval > usual.interval
        assert found.disk < usual.disk


@pytest.mark.parametrize("path", sorted(RESULTS.glob("compress-*-h200.json")), ids=lambda path: path.stem)
def test_the_disk_that_recorded_runs_took(path: Path) -> None:
    """The plan may be above, hardly below."""
    record = json.loads(path.read_text())
    config = config_of(record["settings"])
    for row in record["rows"]:
        if "limits" in path.stem and "device_limit" not in row["planned"]:
            continue  # its interval followed from what was free of the disk, which was not recorded
        tokens = record["settings"]["windows"] * row["length"]
        steps = record["settings"].get("recover")
        training = (RecoverySettings(rank=64, batch=16, steps=steps),) if steps else ()
        needed = disk_bytes(config, SETTINGS, row["planned"]["interval"], tokens, training)
        if record["environment"]["date"] <= "2026-11-29":  # one state more was kept then
            needed += sum(state_bytes(config, each) // 2 for each in training)
        assert needed == pytest.approx(row["disk_peak"], rel=0.2)
        assert needed > 0.99 * row["disk_peak"]


def _machine_of(record: dict[str, Any], row: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the plan see what it saw then."""
    limit = row["planned"].get("device_limit", 112_583_507_968)
    here = jax.local_devices()[:1] * (record["settings"]["devices"] or 1)
    monkeypatch.setattr(budget, "device_limit", lambda: limit)
    monkeypatch.setattr(budget, "available_host", lambda: 120 * GIB)
    monkeypatch.setattr(jax, "local_devices", lambda: here)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("compress-*-h200.json")), ids=lambda path: path.stem)
def test_the_host_memory_that_recorded_runs_took(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.loads(path.read_text())
    settings, config = record["settings"], config_of(record["settings"])
    for row in record["rows"]:
        if record["environment"]["date"] < "2026-11-30":
            continue  # streams and layers took other ways to the host then
        _machine_of(record, row, monkeypatch)
        limits = Resources(
            max_device_memory=settings["max_device_memory"], max_host_memory=settings["max_host_memory"],
            devices=settings["devices"],
        )  # fmt: skip
        steps = settings.get("recover")
        lora = RecoverySettings(rank=64, batch=16, steps=steps or 1, compute="bfloat16", remat="products")
        shape, training = (settings["windows"], row["length"]), (lora,) if steps else ()
        planned = lay_out(config, SETTINGS, limits, shape, training, row["length"], free_disk=120 * 10**9)
        assert sum(planned.host.values()) == pytest.approx(row["host_peak"], rel=0.2)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("compress-*-h200.json")), ids=lambda path: path.stem)
def test_the_device_memory_that_recorded_runs_took(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.loads(path.read_text())
    settings, config = record["settings"], config_of(record["settings"])
    for row in record["rows"]:
        if settings["resume"] or settings["layers"]:
            continue  # the sweep that needs most was over; no model has so few layers of that size
        _machine_of(record, row, monkeypatch)
        limits = Resources(
            max_device_memory=settings["max_device_memory"], max_host_memory=settings["max_host_memory"],
            devices=settings["devices"],
        )  # fmt: skip
        shape = settings["windows"], row["length"]
        planned = sum(lay_out(config, SETTINGS, limits, shape, free_disk=60 * 10**9).device.values())
        if steps := settings.get("recover"):
            lora = RecoverySettings(rank=64, batch=16, steps=steps, compute="bfloat16", remat="products")
            planned = max(planned, memory_bytes(config, lora, row["length"]))
        assert planned == pytest.approx(row["device_peak"], rel=0.2)


def test_what_training_keeps_is_planned(total: int | None) -> None:
    """Two states at a time while it trains, of factors, two means and the best factors; then the factors stay."""
    config, lora = read_config("llama-3.1-8b"), RecoverySettings(rank=64, batch=8, compute="bfloat16", remat="products")
    every = dataclasses.replace(lora, rank=0)

    def laid(*training: RecoverySettings, **limits: int) -> Budget:
        return lay_out(config, SETTINGS, Resources(**limits), (128, 512), training)

    def disk(*training: RecoverySettings) -> int:
        return disk_bytes(config, SETTINGS, 8, 512, training)

    (trained, _), (weights, _) = planned(config, lora.rank), planned(config, 0)
    assert disk(lora) - disk() == pytest.approx(4 * trained, rel=0.01)  # at the end
    assert disk(every) == pytest.approx(2.1 * weights + 2 * 16 * weights, rel=0.05)  # while it trains
    assert disk(lora, lora) - disk(lora) == pytest.approx(2 * 8.03e9 + 4.14e9, rel=0.02)
    assert disk(lora, every) - disk(lora, lora) > 16 * weights
    limit = "max_host_memory" if total is None else "max_device_memory"
    with pytest.raises(UserError, match="--recover-rank"):
        laid(RecoverySettings(rank=0), **{limit: 60 * GIB})
    laid(lora, **{limit: 60 * GIB})


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_stream_takes_its_dtypes_bytes(dtype: str) -> None:
    config = read_config("smollm2-135m")
    size = stream_bytes(config, CompressionSettings(stream_dtype=dtype), 1000)
    assert size == {"bfloat16": 2, "float32": 4}[dtype] * 1000 * config.hidden_size


@pytest.mark.parametrize("model", ["smollm2-135m", "mamba2-130m", pytest.param("llama-3.1-8b", marks=pytest.mark.slow)])
def test_activations_are_those_that_the_compiler_plans(model: str) -> None:
    """Going back through a layer is what takes most; shapes alone are compiled."""
    config = read_config(model)
    for kinds in {*config.pattern}:
        layer = {
            kind: {
                name: jax.ShapeDtypeStruct(elastic.shape(config, leaf), jnp.float32)
                for name, leaf in elastic.leaves(config, kind).items()
            }
            for kind in kinds
        }
        taken = {}
        for count in (8, 16):
            x = jax.ShapeDtypeStruct((count, 512, config.hidden_size), jnp.bfloat16)
            stats = jax.eval_shape(partial(no_statistics, config, kinds, shape=x.shape), layer)
            compiled = layer_statistics.lower(config, kinds, layer, x, x, stats).compile()
            taken[count] = compiled.memory_analysis().temp_size_in_bytes
        measured = (taken[16] - taken[8]) / (8 * 512)
        assert 4 * activation_floats(config, kinds) == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize("row", json.loads((RESULTS / "train-memory-one-h200.json").read_text())["rows"])
def test_training_takes_what_a_gpus_compiler_counts(row: dict[str, Any]) -> None:
    lora = RecoverySettings(rank=row["rank"], batch=row["batch"], compute="bfloat16", remat=row["remat"])
    counted = row["argument_bytes"] + row["scratch_bytes"]
    assert memory_bytes(read_config(row["config"]), lora, row["length"]) == pytest.approx(counted, rel=0.2)
