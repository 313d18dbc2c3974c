"""Running a model whose weights lie on several devices: one program on each, over its own heads and channels.

Blocks compute as they do on one device, with the sizes of a part. Devices wait for one another once after attention and
once after an MLP or mixer, where products are summed, and at the embedding and the head, whose rows are shared out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from uniql_jax import elastic
from uniql_jax.model.cache import Cache, LayerCache, SsmCache
from uniql_jax.weights.shard import Shard, is_shard
from uniql_jax.weights.split import AXIS, Split

EVERYWHERE = PartitionSpec()
STATES = (LayerCache, SsmCache)


def split_of_params(params: Mapping[str, Any]) -> Split | None:
    """How a model's weights are shared out; None: they lie on one device."""
    table = params.get("embed")
    return table.split if isinstance(table, Shard) else None


def _state_specs(state: Any) -> Any:
    """Where the states of one block lie: heads or groups are shared out, in the order of devices."""
    heads = PartitionSpec(None, None, AXIS)
    if isinstance(state, LayerCache):
        return LayerCache(*(None if value is None else heads for value in state.caches))
    inputs = PartitionSpec(None, None, None, AXIS)
    return SsmCache(x=inputs, b=inputs, c=inputs, state=PartitionSpec(None, AXIS))


def _specs(tree: Any) -> Any:
    """Where the arrays of a pytree lie."""

    def one(value: Any) -> Any:
        if isinstance(value, STATES):
            return _state_specs(value)
        if isinstance(value, Shard):
            return jax.tree.map(lambda _: PartitionSpec(AXIS), value)
        return EVERYWHERE

    return jax.tree.map(one, tree, is_leaf=lambda value: isinstance(value, (*STATES, Shard)))


def placed(cache: Cache, split: Split) -> Cache:
    """A cache of the sizes of `Split.whole_config`, each device's part on it."""
    return jax.tree.map(
        lambda value, spec: jax.lax.with_sharding_constraint(value, NamedSharding(split.mesh, spec)),
        cache, _specs(cache),
    )  # fmt: skip


def local_keep(split: Split, keep: tuple[elastic.Keep, ...] | None) -> tuple[elastic.Keep, ...] | None:
    """Kept sizes as this device masks them: of the MLP channels, those that it has."""
    if keep is None:
        return None
    device = jax.lax.axis_index(AXIS)
    return tuple(dict(one) | ({"ffn": split.kept(one["ffn"], device)} if "ffn" in one else {}) for one in keep)


def on_every_device(model: Any, function: Callable[..., Any], *args: Any, like: Any = 0) -> Any:
    """`function(what a device has of the model, *args)` on every device of a model's mesh.

    Args:
        model: a CausalLM whose weights are shared out.
        function: gives the same arrays on every device, and each its own part of the states of a cache.
        args: pytrees of arrays; states of caches are handed out by parts, all else is on every device.
        like: a pytree like the result, or a prefix of it, as far as that holds states.

    Returns:
        The result, put together.
    """

    def local(params: Mapping[str, Any], *args: Any) -> Any:
        own = jax.tree.map(lambda leaf: leaf.local() if is_shard(leaf) else leaf, params, is_leaf=is_shard)
        return function(model.part(own), *args)

    params = dict(model.params)
    specs = tuple(_specs(arg) for arg in (params, *args))
    run = jax.shard_map(local, mesh=model.split.mesh, in_specs=specs, out_specs=_specs(like), check_vma=False)
    return run(params, *args)
