"""Tune: train on with every weight rounded to its stored grid, from the integers that quantizing left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from uniql_jax.compression.artifacts import LayerStore, flatten, layer_name, unflatten
from uniql_jax.compression.contract import Gains, Progress, RecoveryData, SortedModel
from uniql_jax.compression.finite import check_finite
from uniql_jax.compression.stages.recover import SUMMARY, finished
from uniql_jax.compression.stored import TOP, StoredLayers
from uniql_jax.manifest import Manifest
from uniql_jax.train import recover as training
from uniql_jax.train.lora import packed_layer, packed_top
from uniql_jax.train.stack import Lazy
from uniql_jax.weights.fake_quantized import from_quantized
from uniql_jax.weights.quantized import QuantizedArray


def tune(
    teacher: SortedModel,
    quantized: StoredLayers,
    unrounded: LayerStore,
    data: RecoveryData,
    folder: Path,
    store: LayerStore,
    progress: Progress,
    made_from: Manifest | None = None,
) -> Gains:
    """Train the packed model; the integers that come of it go into `store`.

    Nothing is done again where the store is whole already.

    Args:
        teacher: the unpruned dense model to distill from, the original or what recovery made of it.
        quantized: the packed layers.
        unrounded: what was rounded to the packed integers, in steps.
        data: examples and settings.
        folder: keeps the state of the training.
        store: gets the tuned layers.
        progress: called with the steps.
        made_from: as in `recover`.

    Raises:
        UserError: when the loss or a tuned scale is not finite.
    """
    settings, config = data.tuning, quantized.config
    if settings is None:
        raise ValueError("tuning wants settings of its own")
    count = len(config.pattern)
    if not store.has(SUMMARY):

        def layer(i: int) -> dict[str, dict[str, Any]]:
            before = unflatten(unrounded.load(layer_name(i)))
            packed = quantized.layer(i).items()
            return {kind: _trainable(block, before.get(kind, {})) for kind, block in packed}

        layers = Lazy(layer, count)
        tops = _trainable(quantized.top(), unrounded.load(TOP))
        dense = None
        if settings.distill:
            dense = Lazy(teacher.layers.stored, count), jax.device_get(dict(teacher.top))
        result = training.train(
            config, layers, tops, teacher.plan, data.train, data.validation, settings, folder,
            lambda steps: progress(steps, "tune"), teacher=dense,
            made_from=made_from,
        )  # fmt: skip
        factors = jax.device_get(result.factors)
        for i in range(count):
            if store.has(layer_name(i)):
                continue
            tuned = packed_layer(config, i, layers[i], factors, settings.alpha)
            check_finite(tuned, f"layer {i}, tuned:")
            store.save(layer_name(i), flatten(tuned))
        if not store.has(TOP):
            store.save(TOP, packed_top(tops, factors, settings.alpha))
        gains = Gains(result.before, result.after, result.steps, result.best_step)
        store.save(SUMMARY, {}, gains.to_json())
    return finished(store, folder)


def _trainable(leaves: Mapping[str, Any], unrounded: Mapping[str, Any]) -> dict[str, Any]:
    """Packed leaves as FakeQuantizedArrays, the others as they are."""
    return {
        name: from_quantized(value, unrounded[name]) if isinstance(value, QuantizedArray) else value
        for name, value in leaves.items()
    }
