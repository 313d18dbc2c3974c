"""A model of random weights, made on the device at the kept sizes of any prune rate: for measuring what size costs.

Shapes, packing and memory layout are those of a loaded checkpoint, since the same functions decide them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Shaped

from uniql_jax import config as model_config
from uniql_jax import elastic
from uniql_jax.checkpoint_leaves import leaf_group
from uniql_jax.config import ModelConfig
from uniql_jax.errors import UserError
from uniql_jax.evaluation.published import CONFIGS, published
from uniql_jax.evaluation.random_nested import nested_shape, packed_shape
from uniql_jax.files import read_json
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.plan import Plan, check_rate, grouping, make_plan
from uniql_jax.runtime.loading import default_dtype, place_layer, place_top, split_for
from uniql_jax.weights.mixed import MixedArray
from uniql_jax.weights.nested import NestedArray
from uniql_jax.weights.parts import part_like
from uniql_jax.weights.quantized import QuantizedArray
from uniql_jax.weights.shard import Shard
from uniql_jax.weights.split import Split, split_dim

SPREAD = {3: 2.3, 4: 4.6, 8: 73.9}
"""Standard deviation of uniform integers of so many bits; scales divide by it, so that activations stay near one."""


def read_config(name: str) -> ModelConfig:
    """The config of a published model by its name, or of a config.json (or the folder that holds one).

    Raises UserError when there is no such thing, or when it cannot be served.
    """
    path = CONFIGS / f"{name}.json"
    if name not in published():
        path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise UserError(f"no config {name!r}: give the path of a config.json, or one of {', '.join(published())}")
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    try:
        return model_config.from_hf(found)
    except (TypeError, ValueError, ZeroDivisionError) as error:  # a size that is no number, or none at all
        raise UserError(f"{path} is no model's config: {error}") from None


def _leaf_shape(
    config: ModelConfig, leaf: elastic.Leaf, keep: Mapping[str, int], bits: float, dtype: Any, portable: bool
) -> Any:
    """A leaf with jax.ShapeDtypeStruct for arrays: packed (in plain layout), dense in `dtype`, or a float32 vector."""
    shape = elastic.shape(config, leaf, keep)
    if leaf.contract is None:
        return jax.ShapeDtypeStruct(shape, jnp.float32)
    if bits >= 16:
        return jax.ShapeDtypeStruct(shape, dtype)
    group = leaf_group(grouping(config, portable), leaf)
    if bits < 4:
        return nested_shape(config, leaf, shape, bits - 3, group, dtype)
    return packed_shape(leaf, shape, int(bits), group)


def _placed(leaves: dict[str, Any], place: Any) -> dict[str, Any]:
    """Shapes of the packed leaves as the loader places them on this device, which may be another layout."""
    packed = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, QuantizedArray | MixedArray)}
    return leaves | jax.eval_shape(place, packed)


@functools.lru_cache(maxsize=256)
def _block_shapes(
    config: ModelConfig,
    kind: str,
    keep: tuple[tuple[str, int], ...],
    bits: float,
    dtype: Any,
    split: Split | None,
    portable: bool,
) -> Any:
    # Remembered: layers of equal sizes are most of them.
    leaves = elastic.leaves(config, kind).items()
    shapes = {name: _leaf_shape(config, leaf, dict(keep), bits, dtype, portable) for name, leaf in leaves}
    if split is not None:
        shapes = {name: part_like(leaf, shapes[name], split) for name, leaf in leaves}
    return _placed(shapes, lambda packed: place_layer({kind: packed}, dtype)[kind])


def weight_shapes(
    config: ModelConfig,
    bits: float,
    rate: float,
    plan: Plan,
    dtype: Any = None,
    split: Split | None = None,
    portable: bool = False,
) -> dict[str, Any]:
    """The model's `params` with jax.ShapeDtypeStruct in place of arrays; nothing is allocated.

    bits: 4 or 8 (packed), 16 (dense, in `dtype`), or from 3 on: 4 in a share of bits - 3 of the entries, 3 in the
    others. dtype: of activations (default bfloat16 on GPUs, float32 on CPUs), which the layout of packed weights
    depends on too. split: shapes are those of a device's part. portable: groups are those that other runtimes take
    (`plan.axis_layout`).
    """
    dtype = jnp.dtype(default_dtype() if dtype is None else dtype)
    names = ["embed", "norm"] + ([] if config.tie_embeddings else ["head"])
    top = {name: _leaf_shape(config, elastic.TOP[name], {}, bits, dtype, portable) for name in names}
    if split is not None:
        top = {name: part_like(elastic.TOP[name], like, split) for name, like in top.items()}
    if bits < 16 and config.tie_embeddings:  # one rotated table serves twice
        top["head_in"] = jax.ShapeDtypeStruct((config.hidden_size, config.hidden_size), dtype)
    layers = [
        {kind: _block_shapes(config, kind, tuple(sorted(kept.items())), bits, dtype, split, portable) for kind in kinds}
        for kinds, kept in zip(config.pattern, plan.keep(rate), strict=True)
    ]
    return _placed(top, lambda packed: place_top(packed, dtype)) | {"layers": layers}


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays, or of jax.ShapeDtypeStructs in their place."""
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "place"))
def _draw(
    key: Any, index: Int[Array, ""] | int, shape: tuple[int, ...], dtype: Any, low: Any, high: Any, place: Any
) -> Shaped[Array, "..."]:
    """Integers of any bits, or floats from low to high, where a sharding says, or on one device; one small program a
    shape, whatever the rest.
    """
    if place is not None:
        drawn = _draw(key, index, shape, dtype, low, high, None)
        return jax.lax.with_sharding_constraint(drawn, place)
    key = jax.random.fold_in(key, index)
    if jnp.issubdtype(dtype, jnp.integer):
        unsigned = jnp.dtype(f"uint{8 * dtype.itemsize}")
        return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, unsigned), dtype)
    return jax.random.uniform(key, shape, dtype, jnp.asarray(low, dtype), jnp.asarray(high, dtype))


class _Drawer:
    """Turns shapes into random leaves, another draw for each; those of parts into Shards."""

    def __init__(self, config: ModelConfig, seed: int, split: Split | None):
        self.config, self.split = config, split
        self._stacked = False
        self.key = jax.random.key(seed, impl="unsafe_rbg")  # the device's own generator: fast to compile and to run
        self.count = 0

    def array(self, like: jax.ShapeDtypeStruct, low: float = 0.0, high: float = 0.0) -> Array:
        self.count += 1
        shape, place = like.shape, None
        if self.split is not None:
            shape = (self.split.count, *shape) if self._stacked else shape
            place = self.split.stacked if self._stacked else self.split.replicated
        return _draw(self.key, np.int32(self.count), shape, jnp.dtype(like.dtype), low, high, place)

    def leaf(
        self, name: str, leaf: elastic.Leaf, like: Any, layer: int = 0, keep: Mapping[str, int] | None = None
    ) -> Any:
        dim = split_dim(leaf) if self.split is not None else None
        self._stacked = dim is not None
        found = self._leaf(name, leaf, like, layer)
        if dim is None or self.split is None:
            return found
        return Shard(found, self.split, dim, leaf.contract, elastic.shape(self.config, leaf, keep))

    def _leaf(self, name: str, leaf: elastic.Leaf, like: Any, layer: int) -> Any:
        if isinstance(like, MixedArray):
            return MixedArray(*(self._leaf(name, leaf, part, layer) for part in (like.whole, like.rest)))
        if isinstance(like, NestedArray):
            scale = 1 / (SPREAD[3] * math.sqrt(like.width))
            arrays = {part: self.array(getattr(like, part)) for part in ("leading", "last", "fine")}
            return dataclasses.replace(like, coarse=self.array(like.coarse, scale / 2, scale * 1.5), **arrays)
        if isinstance(like, QuantizedArray):
            scale = 1 / (SPREAD[like.bits] * math.sqrt(like.width))
            return dataclasses.replace(
                like, data=self.array(like.data), scale=self.array(like.scale, scale / 2, scale * 1.5)
            )
        if name == "inv_freq":
            angles = np.repeat(self.config.inv_freq(layer)[: like.shape[0], None], like.shape[1], 1)
            if self.split is None:
                return jnp.asarray(angles)
            return jax.device_put(np.repeat(angles[None], self.split.count, 0), self.split.stacked)
        if leaf.contract is None:
            middle = 1.0 if name.endswith("norm") else 0.0
            return self.array(like, middle - 0.1, middle + 0.1)
        width = like.shape[-1] if leaf.contract == "last" else math.prod(like.shape[:-1])
        bound = math.sqrt(3 / width)
        return self.array(like, -bound, bound)


def random_model(
    config: ModelConfig,
    bits: float,
    rate: float = 0.0,
    *,
    plan: Plan | None = None,
    dtype: Any = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    portable: bool = False,
) -> CausalLM:
    """A model of random weights at a prune rate from 0 to 0.35, made on the device and never held by the host.

    bits: as for `weight_shapes`. plan: uniform over the layers when None. dtype: of activations (default bfloat16 on
    GPUs, float32 on CPUs). mesh: devices that share it, where there are several, for 4 bits and more. portable: as for
    `weight_shapes`. Raises UserError on a bad rate.
    """
    rate = check_rate(rate)
    plan = make_plan(config, None) if plan is None else plan
    dtype = default_dtype() if dtype is None else dtype
    split = None
    if mesh is not None and mesh.size > 1:
        split = split_for(config, mesh, grouping(config, portable) if bits < 16 else {})
    shapes = weight_shapes(config, bits, rate, plan, dtype, split, portable)
    drawer, keep = _Drawer(config, seed, split), plan.keep(rate)
    top = {name: drawer.leaf(name, elastic.TOP[name], like) for name, like in shapes.items() if name != "layers"}
    layers = [
        {
            kind: {
                name: drawer.leaf(name, elastic.BLOCKS[kind][name], like, i, keep[i]) for name, like in block.items()
            }
            for kind, block in layer.items()
        }
        for i, layer in enumerate(shapes["layers"])
    ]
    return CausalLM(config, top | {"layers": layers}, plan, rate, None, dtype)
