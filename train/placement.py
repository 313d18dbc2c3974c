"""Where weights, factors and optimizer state lie while training, and how much memory they take of a device."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from uniql_jax import elastic
from uniql_jax.config import ModelConfig
from uniql_jax.counting import activation_floats
from uniql_jax.train import lora
from uniql_jax.train.losses import LOGITS
from uniql_jax.train.settings import RecoverySettings

SPREAD = 2**20
"""Arrays of so many numbers are shared out among the devices; smaller ones are on each."""


def memory_bytes(config: ModelConfig, options: RecoverySettings, length: int, devices: int = 1) -> int:
    """About what a step on examples of this length takes on each of so many devices: weights, factors, optimizer, the
    activations that its gradient keeps of every layer, and what going back through one layer or the loss takes.
    """
    size = jnp.dtype(options.compute).itemsize
    trained, frozen = lora.planned(config, options.rank)
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    # factors, their gradients, two means of the optimizer for each, what came of `adapt`
    copies = 4 + bool(options.adapt)
    held = (size * (frozen + tables) + 4 * copies * trained) // devices
    tokens = options.batch // options.accumulate * length // devices
    kept = sum(_kept_bytes(config, kinds, options.remat, size) for kinds in config.pattern)
    layer = tokens * 4 * max(activation_floats(config, kinds) for kinds in {*config.pattern})
    # Logits in float32 and their gradient in 16 bits, of the teacher as well; while they are there no layer goes back.
    logits = (1 + bool(options.distill)) * 6 * min(LOGITS, tokens * config.vocab_size)
    # A layer's weights and the tables are whole while they are computed with, and the layer's gradient with them.
    whole = size * (2 * frozen // len(config.pattern) + tables) if devices > 1 else 0
    return held + tokens * kept + max(layer, logits) + whole


def host_bytes(config: ModelConfig, options: RecoverySettings) -> int:
    """About what training takes of the host's memory where devices have their own: embedding and head as they are read
    and as they are placed, the best factors so far, and a copy of factors and optimizer state while they are saved.
    """
    trained, _ = lora.planned(config, options.rank)
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    return 4 * (2 * tables + 4 * trained)


def _kept_bytes(config: ModelConfig, kinds: tuple[str, ...], remat: str, size: int) -> int:
    """Bytes a token that a gradient keeps of a layer (train/stack.py says what); `size`: of a number."""
    if remat == "none":  # in good part float32, whatever the products are
        return 4 * activation_floats(config, kinds)
    count = config.hidden_size
    if remat == "products":
        for kind in kinds:
            for leaf in elastic.leaves(config, kind).values():
                if leaf.contract:
                    *lead, last = elastic.shape(config, leaf)
                    count += last if leaf.contract == "first" else math.prod(lead)
    return size * count


def data_mesh(rows: int) -> Mesh:
    """A mesh of all devices along one axis, "data"; of fewer where `rows` does not divide among all."""
    devices = jax.devices()
    return Mesh(np.asarray(devices[: math.gcd(rows, len(devices))]), ("data",))


def sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """Where an array of weights, factors or optimizer state lies: shared out along its longest axis that divides among
    the devices, but the first one, which counts stacked layers; on every device if it is small or none divides.
    """
    axis = _axis(mesh, shape)
    return NamedSharding(mesh, PartitionSpec(*("data" if i == axis else None for i in range(len(shape)))))


def layer_sharding(mesh: Mesh, shape: Sequence[int], count: int) -> NamedSharding:
    """Where a layer's array lies before `count` of them are stacked, which `sharding` then places."""
    return NamedSharding(mesh, PartitionSpec(*sharding(mesh, (count, *shape)).spec[1:]))


def _axis(mesh: Mesh, shape: Sequence[int]) -> int | None:
    axes = [axis for axis in range(1, len(shape)) if shape[axis] % mesh.size == 0]
    if mesh.size == 1 or math.prod(shape) < SPREAD or not axes:
        return None
    return max(axes, key=lambda axis: shape[axis])


@flax.struct.dataclass
class Shard:
    """A device's part of an array that is shared out along `axis` among `count` devices, inside `jax.shard_map`."""

    value: Any
    axis: int = flax.struct.field(pytree_node=False)
    count: int = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole array."""
        return tuple(size * self.count if i == self.axis else size for i, size in enumerate(self.value.shape))

    def gathered(self, layer: bool) -> Array:
        """The whole array, or of a `layer` that a scan took from the stacked ones; its gradient is summed over the
        devices and shared out again.
        """
        return jax.lax.all_gather(self.value, "data", axis=self.axis - layer, tiled=True)


def shards(mesh: Mesh, shapes: Any, parts: Any) -> Any:
    """Parts of the arrays of these shapes, as `jax.shard_map` hands them out, as Shards where they are not whole."""

    def one(array: Any, part: Any) -> Any:
        axis = _axis(mesh, array.shape)
        return part if axis is None else Shard(part, axis, mesh.size)

    return jax.tree.map(one, shapes, parts)


def gathered(tree: Any, layer: bool = False) -> Any:
    """A pytree with its Shards whole, for as long as they are computed with."""
    return jax.tree.map(
        lambda leaf: leaf.gathered(layer) if isinstance(leaf, Shard) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, Shard),
    )


def shared(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(factors, frozen, part of a batch, keep, key)`, which gives a pytree of sums, by all devices.

    Each takes some rows, and the weights as Shards. Every row has a key of its own, so that it makes no difference who
    takes it.
    """
    rows = PartitionSpec("data")

    def whole(factors: Any, frozen: Any, part: Any, keep: Any, key: Key[Array, ""] | None) -> Any:
        def local(factors_here: Any, frozen_here: Any, part: Any, keep: Any, key: Key[Array, ""] | None) -> Any:
            if key is not None:
                count = len(part["tokens"])
                first = count * jax.lax.axis_index("data") if mesh.size > 1 else 0
                key = jax.vmap(functools.partial(jax.random.fold_in, key))(first + jnp.arange(count))
            weights = shards(mesh, (factors, frozen), (factors_here, frozen_here))
            return jax.tree.map(lambda value: value[None], function(*weights, part, keep, key))

        if mesh.size == 1:
            found = local(factors, frozen, part, keep, key)
        else:
            places = jax.tree.map(lambda value: sharding(mesh, value.shape).spec, (factors, frozen))
            specs = (*places, rows, PartitionSpec(), PartitionSpec())
            each = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
            found = each(factors, frozen, part, keep, key)
        return jax.tree.map(lambda value: value.sum(0), found)

    return whole
