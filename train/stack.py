"""Layers of one shape, stacked and run by one `lax.scan`: a deep model compiles in the time of one layer.

Masks keep every layer at its full size while training, so neighbours of one kind have leaves of the same shapes; at a
real prune rate they differ, which is why only training runs this way.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key

from uniql_jax import elastic
from uniql_jax.config import ModelConfig
from uniql_jax.model.causal_lm import apply_layer
from uniql_jax.model.layers.context import Context
from uniql_jax.train.lora import Factors, Layer, fold_in, with_factors
from uniql_jax.train.placement import gathered
from uniql_jax.train.settings import REMAT
from uniql_jax.weights.lora import PRODUCT

POLICIES = {"products": jax.checkpoint_policies.save_only_these_names(PRODUCT), "all": None}


class Run(NamedTuple):
    """Neighbouring layers of the same blocks: `count` of them from layer `first` on."""

    kinds: tuple[str, ...]
    first: int
    count: int


def runs(config: ModelConfig) -> list[Run]:
    """The layers of a model, in order, as few runs."""
    found, first = [], 0
    for kinds, group in itertools.groupby(config.pattern):
        count = len(list(group))
        found.append(Run(kinds, first, count))
        first += count
    return found


class Lazy(Sequence[Layer]):
    """Layers that are read whenever they are asked for, and held by nobody."""

    def __init__(self, read: Callable[[int], Layer], count: int):
        self._read, self._count = read, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._read(index)


def stack(layers: Sequence[Layer], run: Run, place: Callable[[Layer], Any] = lambda layer: layer) -> dict[str, Any]:
    """The leaves of a run's layers, each [count, ...], on the devices; a layer at a time is asked for and `place`d."""
    placed = [place(layers[i]) for i in range(run.first, run.first + run.count)]
    leaves = [jax.tree.leaves(layer) for layer in placed]
    tree = jax.tree.structure(placed[0])
    del placed
    stacked = []
    for _ in range(tree.num_leaves):
        values = [layer.pop(0) for layer in leaves]  # of what is stacked nothing else is held
        stacked.append(_together(values, getattr(values[0], "sharding", None)))
    return jax.tree.unflatten(tree, stacked)


def _together(values: list[Any], place: Any) -> Array:
    """The arrays as one, shared out as each of them is."""
    if not isinstance(place, NamedSharding):
        return jnp.stack(values)
    return _stacking(NamedSharding(place.mesh, PartitionSpec(None, *place.spec)))(*values)


@functools.cache
def _stacking(place: NamedSharding) -> Callable[..., Array]:
    return jax.jit(lambda *parts: jnp.stack(parts), out_shardings=place)


def attach(
    stacked: Layer,
    run: Run,
    factors: Factors,
    alpha: float,
    dropout: float = 0.0,
    key: Key[Array, "..."] | None = None,
) -> dict[str, dict[str, Any]]:
    """`lora.attach` for a run, stacked, with the factors of `stack_factors`."""

    def attached(kind: str, leaf: str, value: Any) -> Any:
        name = f"{run.first}.{kind}.{leaf}"
        if name not in factors:
            return value
        keys = None
        if key is not None:
            names = [f"{i}.{kind}.{leaf}" for i in range(run.first, run.first + run.count)]
            numbers = np.asarray([zlib.crc32(n.encode()) for n in names], np.uint32)
            # all at once: XLA compiles every single drawing of a key, and there are as many as matrices in the model
            keys = jax.vmap(functools.partial(fold_in, key))(numbers)
        return with_factors(value, elastic.BLOCKS[kind][leaf], factors[name], alpha, dropout, keys, stacked=True)

    return {
        kind: {leaf: attached(kind, leaf, value) for leaf, value in block.items()} for kind, block in stacked.items()
    }


def stack_factors(config: ModelConfig, factors: Factors) -> Factors:
    """Factors of single layers as those of runs, each [count, ...], named like those of a run's first layer.

    An optimizer then has a few dozen arrays to work on, whatever the depth.
    """
    found = _of_tables(factors)
    for run in runs(config):
        for name in factors:
            first, rest = name.split(".", 1)
            if first == str(run.first):
                pairs = [factors[f"{i}.{rest}"] for i in range(run.first, run.first + run.count)]
                found[name] = {side: jnp.stack([jnp.asarray(p[side]) for p in pairs]) for side in factors[name]}
    return found


def unstack_factors(config: ModelConfig, factors: Factors) -> Factors:
    """Inverse of `stack_factors`."""
    found = _of_tables(factors)
    for run in runs(config):
        for name, pair in factors.items():
            first, rest = name.split(".", 1)
            if first == str(run.first):
                for i in range(run.count):
                    found[f"{run.first + i}.{rest}"] = {side: value[i] for side, value in pair.items()}
    return found


def _of_tables(factors: Factors) -> Factors:
    """The factors of embedding and head, which are in no run."""
    return {name: dict(pair) for name, pair in factors.items() if name.startswith("top.")}


def apply_runs(
    config: ModelConfig,
    stacks: Sequence[Mapping[str, Mapping[str, Any]]],
    x: Float[Array, "b t h"],
    context: Context,
    keep: Sequence[elastic.Keep] | None = None,
    remat: str = "none",
) -> Float[Array, "b t h"]:
    """The residual stream after all layers, given the stacked leaves of every run; `keep`, one mapping a layer, masks.

    `remat`: what a gradient keeps of each layer, one of REMAT, and computes the rest again. Raises ValueError for any
    other. Leaves that are Shards are gathered a layer at a time.
    """
    if remat not in REMAT:
        raise ValueError(f"remat is one of {', '.join(REMAT)}, not {remat!r}")
    for run, leaves in zip(runs(config), stacks, strict=True):
        kept = None
        if keep is not None:
            kept = jax.tree.map(lambda *counts: jnp.stack(counts), *map(dict, keep[run.first : run.first + run.count]))

        step = functools.partial(_step, config, run.kinds, context)
        # Inside a scan nothing can be merged across the checkpoint, so what hinders that may be left out.
        step = jax.checkpoint(step, prevent_cse=False, policy=POLICIES[remat]) if remat in POLICIES else step
        x, _ = jax.lax.scan(step, x, (leaves, kept))
    return x


def _step(
    config: ModelConfig,
    kinds: tuple[str, ...],
    context: Context,
    x: Array,
    one: tuple[Layer, elastic.Keep | None],
) -> tuple[Array, None]:
    leaves, keep = one
    return apply_layer(config, kinds, gathered(leaves, layer=True), x, context._replace(keep=keep)), None
