"""The precision in which the pass multiplies, on the device that it runs on."""

from __future__ import annotations

import jax

from uniql_jax.compression.settings import PRECISIONS, CompressionSettings


def matmul_precision(settings: CompressionSettings, *, solves: bool = False) -> str:
    """What `jax.default_matmul_precision` takes on this device, for activations or for what is solved from them."""
    if jax.default_backend() == "cpu":
        return PRECISIONS["float32"]
    return PRECISIONS["bf16x3" if solves and settings.precision != "float32" else settings.precision]
