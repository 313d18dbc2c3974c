"""Rotate: fold norm weights and an orthogonal factor into the matrices, so that outliers of the stream are spread."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from uniql_jax.compression.math.rotation import orthogonal, rotate_block, rotate_top
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.compression.stages.calibrate import Layer, Top
from uniql_jax.config import ModelConfig

Rotation = Float[Array, "h h"] | None


def rotation(config: ModelConfig, settings: CompressionSettings) -> Rotation:
    """The orthogonal factor of a packed model, [hidden, hidden] float32; None where the stream stays as it is."""
    if not (settings.packed and settings.rotate):
        return None
    return jnp.asarray(orthogonal(config.hidden_size, settings.seed), jnp.float32)


def rotated_layer(layer: Layer, q: Rotation) -> Layer:
    """A dense layer that reads and writes the rotated stream."""
    return layer if q is None else {kind: rotate_block(kind, block, q) for kind, block in layer.items()}


def rotated_top(top: Top, q: Rotation) -> dict[str, Any]:
    """Embedding, final norm and head on the rotated stream."""
    return dict(top) if q is None else rotate_top(top, q)
