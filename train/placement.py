"""Where weights, factors and optimizer state lie while training, and how much memory they take of a device."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uniql_jax.config import ModelConfig
from uniql_jax.train import lora
from uniql_jax.train.settings import RecoverySettings

WHOLE = PartitionSpec()
SPREAD = 2**20
"""Arrays of so many numbers are shared out among the devices; smaller ones are on each."""


def memory_bytes(config: ModelConfig, options: RecoverySettings, devices: int = 1) -> int:
    """About what weights, factors and optimizer take on each of so many devices; activations come on top."""
    trained, frozen = lora.planned(config, options.rank)
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    # factors, their gradients, two means and a count of the optimizer for each, what came of `adapt`
    numbers = 4 + 4 + 2 * 4 + 2 + 4 * bool(options.adapt)
    return (jnp.dtype(options.compute).itemsize * (frozen + tables) + numbers * trained) // devices


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


def gathered(mesh: Mesh, tree: Any, stacked: int = 1) -> Any:
    """Arrays whole on every device while they are computed with; their gradients are shared out again.

    Without this the compiler might share out the products instead of the examples, and attention takes no heads that
    are shared out.

    Args:
        mesh: the devices.
        tree: a pytree of arrays; one layer's of what is `stacked`, or what is not.
        stacked: layers of the array that `sharding` shared out.
    """
    if mesh.size == 1:
        return tree

    def whole(value: Any) -> Any:
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return value
        spec = PartitionSpec(*sharding(mesh, (stacked, *value.shape)).spec[1:])
        return _gathered(mesh, spec, value) if jnp.issubdtype(value.dtype, jnp.inexact) else _placed(mesh, value, WHOLE)

    return jax.tree.map(whole, tree)


def _placed(mesh: Mesh, value: Any, spec: PartitionSpec) -> Any:
    return jax.lax.with_sharding_constraint(value, NamedSharding(mesh, spec))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(mesh: Mesh, spec: PartitionSpec, value: Any) -> Any:
    return _placed(mesh, value, WHOLE)


_gathered.defvjp(
    lambda mesh, spec, value: (_placed(mesh, value, WHOLE), None),
    lambda mesh, spec, _, gradient: (_placed(mesh, gradient, spec),),
)
