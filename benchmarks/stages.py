"""The stages of the pass one by one, for comparing settings: statistics are gathered once and sorted many times."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from uniql_jax.compression.artifacts import LayerStore, flatten, layer_name
from uniql_jax.compression.contract import DenseModel, RecoveryData, SortedModel
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.compression.sorting import sort_layer
from uniql_jax.compression.stages.calibrate import Calibration, backward_sweep, forward_sweep
from uniql_jax.compression.stages.plan import plan as make
from uniql_jax.compression.stages.quantize import quantize
from uniql_jax.compression.stages.tune import tune
from uniql_jax.compression.stages.write import write
from uniql_jax.compression.stored import StoredLayers
from uniql_jax.compression.streams import StreamStore, Windows
from uniql_jax.plan import Plan


def _quiet(items: Any, stage: str) -> Any:
    return items


@dataclasses.dataclass(frozen=True)
class Measured:
    """A model's statistics on its calibration windows (two Gram matrices a layer), for sorting it in many ways."""

    source: DenseModel
    top: dict[str, jax.Array]
    windows: Windows
    calibration: Calibration
    layers: list[tuple[int, Any, Any]]


def measure(source: DenseModel, tokens: np.ndarray, folder: Path, batch_tokens: int, backward: bool = True) -> Measured:
    """Both calibration sweeps, with the statistics that every score wants; the first alone without `backward`."""
    windows = Windows(tokens, batch_tokens)
    streams = StreamStore(folder / "streams", windows, 1)
    top = source.device_top()
    calibration = forward_sweep(source, top, LayerStore(folder / "calibration"), streams, _quiet)
    last = len(source.config.pattern) - 1
    layers = list(backward_sweep(source, top, streams, last, thorough=True)) if backward else []
    return Measured(source, top, windows, calibration, layers)


def compress(
    measured: Measured,
    settings: CompressionSettings,
    folder: Path,
    train: Callable[[Plan, list[Any]], list[Any]] | None = None,
) -> tuple[Path, int]:
    """The checkpoint of these settings and the bytes of its tensors: what `compress` does after its calibration.

    train: makes other layers of the sorted ones before they are finished.
    """
    source, config = measured.source, measured.source.config
    store = LayerStore(folder / "sorted")
    for i, layer, means in measured.layers:
        done, losses = sort_layer(config, config.pattern[i], layer, means, settings, settings.seed + i)
        record = {axis: np.asarray(loss).tolist() for axis, loss in losses.items()}
        store.save(layer_name(i), flatten(jax.device_get(done)), record)
    plan = make(config, measured.calibration, store, settings)
    if train is not None:
        layers = train(plan, [store.layer(i) for i in range(len(config.pattern))])
        store = LayerStore(folder / "trained")
        for i, layer in enumerate(layers):
            store.save(layer_name(i), flatten(jax.device_get(layer)))
    finished = finish(measured, plan, store, settings, folder)[0]
    section = {"plan": plan.to_json(), "options": dataclasses.asdict(settings)}
    return folder / "checkpoint", write(folder / "checkpoint", source, finished, section)


def finish(
    measured: Measured,
    plan: Plan,
    layers: LayerStore,
    settings: CompressionSettings,
    folder: Path,
    unrounded: LayerStore | None = None,
) -> tuple[StoredLayers, LayerStore]:
    """Rotate, refit and quantize the layers of a store."""
    config, done = measured.source.config, LayerStore(folder / "quantized")
    streams = StreamStore(folder / "streams", measured.windows, 1)
    model = SortedModel(config, plan, measured.top, layers)
    quantize(model, measured.calibration, settings, done, unrounded, streams, _quiet)
    return StoredLayers(config, settings, done), done


def tuned(
    measured: Measured,
    plan: Plan,
    teacher: LayerStore,
    finished: StoredLayers,
    unrounded: LayerStore,
    data: RecoveryData,
    settings: CompressionSettings,
    folder: Path,
    progress: Any = _quiet,
) -> tuple[StoredLayers, Any]:
    """Train on after quantizing; the layers that come of it, and what was gained."""
    store = LayerStore(folder / "tuned")
    model = SortedModel(measured.source.config, plan, measured.top, teacher)
    gains = tune(model, finished, unrounded, data, folder / "tune", store, progress)
    return StoredLayers(measured.source.config, settings, store), gains
