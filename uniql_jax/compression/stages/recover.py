"""Recover: masked LoRA (or a change of every weight) trained on the sorted model at all rates, then merged."""

from __future__ import annotations

from pathlib import Path

import jax

from uniql_jax.compression.artifacts import LayerStore, flatten, layer_name
from uniql_jax.compression.contract import Gains, Progress, RecoveryData, SortedModel
from uniql_jax.compression.finite import check_finite
from uniql_jax.train import recover as training
from uniql_jax.train.lora import merge_layer
from uniql_jax.train.stack import Lazy

SUMMARY = "summary"


def recover(model: SortedModel, data: RecoveryData, folder: Path, store: LayerStore, progress: Progress) -> Gains:
    """Train on the sorted layers and keep every layer with what was trained merged in.

    Nothing is done again where the store holds all layers already.

    Args:
        model: what to train.
        data: examples and settings.
        folder: keeps the state of the training.
        store: gets the merged layers.
        progress: called with the steps.

    Raises:
        UserError: when the loss or a merged weight is not finite.
    """
    if not store.has(SUMMARY):
        layers = Lazy(model.layers.stored, len(model.config.pattern))
        result = training.train(
            model.config, layers, jax.device_get(model.top), model.plan, data.train, data.validation, data.settings,
            folder, lambda steps: progress(steps, "recover"),
        )  # fmt: skip
        factors = jax.device_get(result.factors)
        for i, layer in enumerate(layers):
            if store.has(layer_name(i)):
                continue
            merged = merge_layer(i, layer, factors, data.settings.alpha)
            check_finite(merged, f"layer {i}, recovered:")
            store.save(layer_name(i), flatten(merged))
        gains = Gains(result.before, result.after, result.steps, result.best_step)
        store.save(SUMMARY, {}, gains.to_json())
    return Gains.from_json(store.record(SUMMARY))
