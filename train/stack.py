"""Layers of one shape, stacked and run by loops (`lax.scan`): a deep model compiles in the time of a few layers.

Masks keep every layer at its full size while training, so layers of one kind have leaves of the same shapes; at a real
prune rate they differ, which is why only training runs this way. The 52 layers of Nemotron-H-8B are 13 in its program:
11 that come four times, and mamba and mlp four times more.
"""

from __future__ import annotations

import functools
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


Kinds = tuple[str, ...]


class Run(NamedTuple):
    """Layers of the same blocks that one part of the program works on, in their order."""

    kinds: Kinds
    layers: tuple[int, ...]

    @property
    def first(self) -> int:
        """Its first layer, after which it is named."""
        return self.layers[0]

    @property
    def count(self) -> int:
        """How many layers it has."""
        return len(self.layers)


class Loop(NamedTuple):
    """Layers of these kinds, one after the other, `count` times."""

    unit: tuple[Kinds, ...]
    count: int


@functools.cache
def loops(pattern: tuple[Kinds, ...]) -> tuple[Loop, ...]:
    """Layers' kinds as loops whose programs have as few layers together as can be.

    There is no loop in a loop: it would have its weights, and what a gradient keeps of it, copied at every turn of the
    outer one, and compile no faster.
    """
    length, found = len(pattern), (Loop(pattern, 1),)
    for period in range(1, length // 2 + 1):
        if length % period == 0 and pattern == pattern[:period] * (length // period):
            return (Loop(pattern[:period], length // period),)
    for cut in range(1, length):
        both = loops(pattern[:cut]) + loops(pattern[cut:])
        if _size(both) < _size(found):
            found = both
    return found


def _size(found: Sequence[Loop]) -> int:
    return sum(len(loop.unit) for loop in found)


def runs(config: ModelConfig) -> list[Run]:
    """The layers of a model as few runs, those of `loops` in order."""
    found, first = [], 0
    for unit, count in loops(config.pattern):
        end = first + count * len(unit)
        found += [Run(kinds, tuple(range(first + i, end, len(unit)))) for i, kinds in enumerate(unit)]
        first = end
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
    placed = [place(layers[i]) for i in run.layers]
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
            names = [f"{i}.{kind}.{leaf}" for i in run.layers]
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
                pairs = [factors[f"{i}.{rest}"] for i in run.layers]
                found[name] = {side: jnp.stack([jnp.asarray(p[side]) for p in pairs]) for side in factors[name]}
    return found


def unstack_factors(config: ModelConfig, factors: Factors) -> Factors:
    """Inverse of `stack_factors`."""
    found = _of_tables(factors)
    for run in runs(config):
        for name, pair in factors.items():
            first, rest = name.split(".", 1)
            if first == str(run.first):
                for i, layer in enumerate(run.layers):
                    found[f"{layer}.{rest}"] = {side: value[i] for side, value in pair.items()}
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
    parts = []
    for run, leaves in zip(runs(config), stacks, strict=True):
        kept = None
        if keep is not None:
            kept = jax.tree.map(lambda *counts: jnp.stack(counts), *(dict(keep[i]) for i in run.layers))
        parts.append((leaves, kept))

    def layer(kinds: Kinds, alone: bool) -> Callable[[Array, Any], Array]:
        step = functools.partial(_step, config, kinds, context)
        # From one turn of a loop to the next nothing can be merged across the checkpoint, so what hinders that may be
        # left out. Outside of loops what is computed again would be merged with the first time, and kept.
        return jax.checkpoint(step, prevent_cse=alone, policy=POLICIES[remat]) if remat in POLICIES else step

    def turn(unit: Sequence[Kinds], alone: bool, x: Array, own: Sequence[Any]) -> Array:
        for kinds, one in zip(unit, own, strict=True):
            x = layer(kinds, alone)(x, one)
        return x

    for unit, count in loops(config.pattern):
        own, parts = parts[: len(unit)], parts[len(unit) :]
        if count == 1:
            x = turn(unit, True, x, jax.tree.map(lambda value: value[0], own))
        else:
            x, _ = jax.lax.scan(lambda x, own, unit=unit: (turn(unit, False, x, own), None), x, own)
    return x


def _step(
    config: ModelConfig,
    kinds: tuple[str, ...],
    context: Context,
    x: Array,
    one: tuple[Layer, elastic.Keep | None],
) -> Array:
    leaves, keep = one
    return apply_layer(config, kinds, gathered(leaves, layer=True), x, context._replace(keep=keep))
