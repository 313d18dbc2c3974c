"""Where weights, factors and optimizer state lie while training, and how much memory they take of a device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uniql_jax.config import ModelConfig
from uniql_jax.train import lora
from uniql_jax.train.settings import RecoverySettings

SPREAD = 2**20
"""Arrays of so many numbers are shared out among the devices; smaller ones are on each."""


def memory_bytes(config: ModelConfig, options: RecoverySettings, devices: int = 1) -> int:
    """About what weights, factors and optimizer take on each of so many devices; activations come on top."""
    trained, frozen = lora.planned(config, options.rank)
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    # factors, their gradients and three numbers of the optimizer for each, the best state, what came of `adapt`
    copies = 6 + bool(options.adapt)
    return (jnp.dtype(options.compute).itemsize * (frozen + tables) + 4 * copies * trained) // devices


def data_mesh(rows: int) -> Mesh:
    """A mesh of all devices along one axis, "data"; of fewer where `rows` does not divide among all."""
    devices = jax.devices()
    return Mesh(np.asarray(devices[: math.gcd(rows, len(devices))]), ("data",))


def sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """Where an array of weights, factors or optimizer state lies: shared out along its longest axis that divides among
    the devices, but the first one, which counts stacked layers; on every device if it is small or none divides.
    """
    axes = [axis for axis in range(1, len(shape)) if shape[axis] % mesh.size == 0]
    if mesh.size == 1 or math.prod(shape) < SPREAD or not axes:
        return NamedSharding(mesh, PartitionSpec())
    longest = max(axes, key=lambda axis: shape[axis])
    return NamedSharding(mesh, PartitionSpec(*("data" if axis == longest else None for axis in range(len(shape)))))
