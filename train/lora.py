"""What training changes of a whole model, LoRA factors or updates of every weight: made, joined to the weights for a
training step, and merged into them at the end.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from uniql_jax import elastic
from uniql_jax.checkpoint_writer import reachable_bias
from uniql_jax.compiling import jit
from uniql_jax.config import ModelConfig
from uniql_jax.elastic import Leaf
from uniql_jax.errors import UserError
from uniql_jax.train.settings import alpha_of as alpha_of
from uniql_jax.transfer import to_host
from uniql_jax.weights.delta import DeltaArray
from uniql_jax.weights.fake_quantized import FakeQuantizedArray
from uniql_jax.weights.lora import LoraArray

Layer = Mapping[str, Mapping[str, Any]]
Factors = dict[str, dict[str, Array | np.ndarray]]
"""{"layer.kind.leaf": {"left": [*lead, rank], "right": [rank, h]}}, float32: what training changes; at rank 0
{"change": [*lead, h]} each.
"""
Update = LoraArray | DeltaArray | FakeQuantizedArray


def targets(config: ModelConfig) -> Iterator[tuple[str, Leaf]]:
    """("layer.kind.leaf", leaf) of every matrix of every block."""
    for i, kinds in enumerate(config.pattern):
        for kind in kinds:
            for name, leaf in elastic.leaves(config, kind).items():
                if leaf.contract is not None:
                    yield f"{i}.{kind}.{name}", leaf


def init_factors(config: ModelConfig, rank: int, seed: int, tables: Sequence[str] = ()) -> Factors:
    """Factors whose product is zero: `right` is uniform in +-1/sqrt(inputs), `left` is zero; at rank 0 changes of zero.

    It is always the factor with the elastic axis that starts at zero, whether it reads or writes: what few steps see,
    such as the entries that only rate 0 keeps, is then changed by those steps alone, however far the shared factor
    moves at the other rates. `tables`: the leaves of `elastic.TOP` that have factors as well, as "top.leaf". The same
    on every machine and JAX version.
    """
    rng = np.random.default_rng(seed)
    factors: Factors = {}
    for name, leaf in [*targets(config), *((f"top.{name}", elastic.TOP[name]) for name in tables)]:
        *lead, width = shape = elastic.shape(config, leaf)
        if not rank:
            factors[name] = {"change": jnp.zeros(shape, jnp.float32)}
            continue
        right = jnp.asarray(rng.uniform(-1, 1, (rank, width)) * usual_size(leaf, shape), jnp.float32)
        factors[name] = {"left": jnp.zeros((*lead, rank), jnp.float32), "right": right}
    return factors


def usual_size(leaf: Leaf, shape: Sequence[int]) -> float:
    """About the size of a weight: 1 / sqrt(inputs)."""
    return 1 / math.sqrt(shape[-1] if leaf.contract == "last" else math.prod(shape[:-1]))


def with_factors(
    value: Any,
    leaf: Leaf,
    factors: Mapping[str, Array | np.ndarray],
    alpha: float,
    dropout: float = 0.0,
    key: Key[Array, "..."] | None = None,
    stacked: bool = False,
) -> Update:
    """A weight with its factors; `stacked`: both have an axis of layers in front. Without a low-rank path nothing of
    what it receives is dropped.
    """
    if isinstance(value, FakeQuantizedArray):
        if key is not None:
            raise ValueError("a weight that trains as it will be stored has no low-rank path to drop inputs of")
        scale = 1.0 if "change" in factors else alpha / factors["right"].shape[-2]
        return dataclasses.replace(value, **factors, scale=scale)
    if "change" in factors:
        change = factors["change"]
        return DeltaArray(value, change, scale=usual_size(leaf, change.shape[stacked:]))
    left, right = factors["left"], factors["right"]
    return LoraArray(value, left, right, key, scale=alpha / right.shape[-2], dropout=dropout)


def described(rank: int) -> str:
    """What is trained, in words."""
    return f"LoRA rank {rank}" if rank else "every weight"


def count(factors: Factors) -> int:
    """How many numbers are trained."""
    return sum(factor.size for factor in jax.tree.leaves(factors))


def planned(config: ModelConfig, rank: int) -> tuple[int, int]:
    """(numbers that are trained, weights that they change), known before there are any."""
    shapes = [elastic.shape(config, leaf) for _, leaf in targets(config)]
    weights = sum(math.prod(shape) for shape in shapes)
    return sum(rank * (math.prod(shape[:-1]) + shape[-1]) for shape in shapes) or weights, weights


def attach(
    layers: Sequence[Layer],
    factors: Factors,
    alpha: float,
    dropout: float = 0.0,
    key: Key[Array, "..."] | None = None,
) -> list[dict[str, dict[str, Any]]]:
    """The layers with what `with_factors` makes of every weight that has factors; traceable, nothing is copied.

    With a key, or one for each row of a batch, `dropout` of what each low-rank path receives is dropped, differently
    for every leaf.
    """

    def attached(name: str, leaf: Leaf, value: Any) -> Any:
        if name not in factors:
            return value
        own = None if key is None else fold_in(key, zlib.crc32(name.encode()))
        return with_factors(value, leaf, factors[name], alpha, dropout, own)

    return [_mapped(i, layer, attached) for i, layer in enumerate(layers)]


def fold_in(key: Key[Array, "..."], number: Any) -> Key[Array, "..."]:
    """`jax.random.fold_in` for one key or for each of several."""
    return jax.random.fold_in(key, number) if key.ndim == 0 else jax.vmap(lambda one: fold_in(one, number))(key)


def _mapped(i: int, layer: Layer, change: Callable[[str, Leaf, Any], Any]) -> dict[str, dict[str, Any]]:
    """change("layer.kind.leaf", leaf, value) of every leaf of layer i."""
    return {
        kind: {name: change(f"{i}.{kind}.{name}", elastic.BLOCKS[kind][name], value) for name, value in block.items()}
        for kind, block in layer.items()
    }


def merge_layer(i: int, layer: Layer, factors: Factors, alpha: float) -> dict[str, dict[str, Any]]:
    """Layer i with its update in its weights: matrices float32 numpy arrays, the rest as it was.

    Raises:
        UserError: a merged weight is not finite; the message names it.
    """
    own = {name: value for name, value in factors.items() if name.split(".", 1)[0] == str(i)}
    parts = {name.split(".", 1)[1]: pair for name, pair in own.items()}
    values = {name: layer[name.split(".")[0]][name.split(".")[1]] for name in parts}
    dense, finite = to_host(_merged(values, parts, alpha))
    for name, sound in finite.items():
        if not sound:
            raise _not_finite(f"{i}.{name}")
    return _mapped(i, layer, lambda name, leaf, value: dense.get(name.split(".", 1)[1], value))


@functools.partial(jit, static_argnums=2)
def _merged(
    values: Mapping[str, Any], factors: Factors, alpha: float
) -> tuple[dict[str, Float[Array, "..."]], dict[str, Bool[Array, ""]]]:
    """Every "kind.leaf" with its update, float32, and whether it is finite: one program for all layers of a kind."""
    dense = {}
    for name, value in values.items():
        kind, leaf = name.split(".")
        dense[name] = with_factors(value, elastic.BLOCKS[kind][leaf], factors[name], alpha).dense()
    return dense, {name: jnp.isfinite(value).all() for name, value in dense.items()}


def packed_top(top: Mapping[str, Any], factors: Factors, alpha: float) -> dict[str, Any]:
    """Embedding, norm and head as they are stored once their factors have moved them; other leaves stay."""
    return {name: _stored_form(f"top.{name}", elastic.TOP[name], value, factors, alpha) for name, value in top.items()}


def _stored_form(name: str, leaf: Leaf, value: Any, factors: Factors, alpha: float) -> Any:
    if not isinstance(value, FakeQuantizedArray):
        return value
    moved: Any = with_factors(value, leaf, factors[name], alpha)
    return _finite(name, moved.quantized())


def _finite(name: str, value: Any) -> Any:
    """The value, unless a number in it is not finite: then UserError."""
    for part in jax.tree.leaves(value):
        if jnp.issubdtype(part.dtype, jnp.floating) and not bool(jnp.isfinite(part).all()):
            raise _not_finite(name)
    return value


def _not_finite(name: str) -> UserError:
    return UserError(f"{name} is not finite after training; a smaller --lr may help")


def packed_layer(
    config: ModelConfig, i: int, layer: Layer, factors: Factors, alpha: float
) -> dict[str, dict[str, Any]]:
    """Layer i of FakeQuantizedArrays as what is stored of them once their factors have moved them."""
    done = _mapped(i, layer, functools.partial(_stored_form, factors=factors, alpha=alpha))
    return {kind: reachable_bias(config, kind, block) for kind, block in done.items()}
