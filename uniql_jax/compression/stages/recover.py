"""Recover: masked LoRA (or a change of every weight) trained on the sorted model at all rates, merged when read."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array

from uniql_jax.compression.artifacts import LayerStore, flatten, layer_name, widened
from uniql_jax.compression.contract import Gains, Progress, RecoveryData, SortedModel
from uniql_jax.compression.writer import Writer
from uniql_jax.manifest import Manifest
from uniql_jax.train import recover as training
from uniql_jax.train.lora import Factors, merge_layer
from uniql_jax.train.stack import Lazy

SUMMARY = "summary"


class Recovered(LayerStore):
    """Sorted layers into which what was trained is merged whenever they are read. Entries hold what was trained: with
    LoRA a small part of a layer.
    """

    def __init__(self, folder: Path, layers: LayerStore, alpha: float, writer: Writer | None = None):
        super().__init__(folder, writer)
        self._layers, self._alpha = layers, alpha

    def stored(self, index: int) -> dict[str, dict[str, np.ndarray]]:
        """A merged layer, {kind: {leaf: array}}, its matrices in float32, in the host's memory."""
        factors: Factors = {}
        for key, value in self.load(layer_name(index)).items():
            name, _, part = key.rpartition(".")
            factors.setdefault(name, {})[part] = value.astype(np.float32)
        return merge_layer(index, self._layers.stored(index), factors, self._alpha)

    def layer(self, index: int) -> dict[str, dict[str, Array]]:
        """A merged layer, float32, on the device."""
        return jax.tree.map(widened, self.stored(index))


def recover(
    model: SortedModel,
    data: RecoveryData,
    folder: Path,
    store: Recovered,
    progress: Progress,
    made_from: Manifest | None = None,
) -> Gains:
    """Train on the sorted layers and keep what was trained of every layer.

    Nothing is done again where the store holds all layers already.

    Args:
        model: what to train.
        data: examples and settings.
        folder: keeps the state of the training.
        store: gets what was trained.
        progress: called with the steps.
        made_from: the inputs of the pass, where it has them; else the layers' own hashes tell one run from another.

    Raises:
        UserError: when the loss or a merged weight is not finite.
    """
    if not store.has(SUMMARY):
        layers = Lazy(model.layers.stored, len(model.config.pattern))
        result = training.train(
            model.config, layers, jax.device_get(model.top), model.plan, data.train, data.validation, data.settings,
            folder, lambda steps: progress(steps, "recover"), made_from=made_from,
        )  # fmt: skip
        factors = jax.device_get(result.factors)
        for i in range(len(layers)):
            if store.has(layer_name(i)):
                continue
            own = {name: parts for name, parts in factors.items() if name.split(".", 1)[0] == str(i)}
            store.save(layer_name(i), flatten(own))
            store.stored(i)  # raises where a merged weight is not finite
        gains = Gains(result.before, result.after, result.steps, result.best_step)
        store.save(SUMMARY, {}, gains.to_json())
    return finished(store, folder)


def finished(store: LayerStore, folder: Path) -> Gains:
    """What a training whose results a store holds has gained; its states, several times as large, go."""
    gains = Gains.from_json(store.record(SUMMARY))
    shutil.rmtree(folder, ignore_errors=True)
    return gains
