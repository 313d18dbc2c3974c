"""Layers in the form in which a checkpoint holds them, read back from a store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from uniql_jax import elastic
from uniql_jax.checkpoint_leaves import assembled, parts_of
from uniql_jax.checkpoint_writer import stored
from uniql_jax.compression.artifacts import LayerStore, layer_name, unflatten
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.config import ModelConfig
from uniql_jax.plan import grouping

TOP = "top"
"""Name of the entry that holds embedding, final norm and head."""


def matrix_dtype(settings: CompressionSettings) -> Any:
    """Type of the matrices that are not packed."""
    return np.float32 if settings.bits == 32 else ml_dtypes.bfloat16


class StoredLayers:
    """The finished leaves of a store: QuantizedArray, NestedArray or numpy arrays."""

    def __init__(self, config: ModelConfig, settings: CompressionSettings, store: LayerStore):
        self.config, self.store = config, store
        self.dtype = matrix_dtype(settings)
        self.meta = {"bits": settings.bits} | dict(grouping(config, settings.portable))
        if settings.nested:
            self.meta["nested"] = {}

    def layer(self, index: int) -> dict[str, dict[str, Any]]:
        """One layer, {kind: {leaf: value}}."""
        found = unflatten(self.store.load(layer_name(index)))
        return {
            kind: self._leaves(block, elastic.BLOCKS[kind], f"layers.{index}.{kind}.") for kind, block in found.items()
        }

    def top(self) -> dict[str, Any]:
        """Embedding, final norm and head."""
        return self._leaves(self.store.load(TOP), elastic.TOP, "")

    def _leaves(self, tensors: Mapping[str, Any], table: Mapping[str, elastic.Leaf], prefix: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in tensors.items():
            name, _, part = key.partition(".")
            if name in out:
                continue
            if part:
                parts = {part: tensors[f"{name}.{part}"] for part in parts_of(self.meta)}
                out[name] = assembled(self.config, self.meta, table[name], parts)
            else:
                out[name] = stored(table[name], value, self.dtype, f"{prefix}{name}")
        return out
