"""LoRA factors of a whole model: made, put beside the weights for a training step, and merged into them at the end."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from uniql_jax import elastic
from uniql_jax.checkpoint import reachable_bias
from uniql_jax.config import ModelConfig
from uniql_jax.elastic import Leaf
from uniql_jax.lora import LoraArray
from uniql_jax.rounded import RoundedArray

Layer = Mapping[str, Mapping[str, Any]]
Factors = dict[str, dict[str, Array | np.ndarray]]
"""{"layer.kind.leaf": {"left": [*lead, rank], "right": [rank, h]}}, float32: what training changes."""


def targets(config: ModelConfig) -> Iterator[tuple[str, Leaf]]:
    """("layer.kind.leaf", leaf) of every matrix of every block."""
    for i, kinds in enumerate(config.pattern):
        for kind in kinds:
            for name, leaf in elastic.leaves(config, kind).items():
                if leaf.contract is not None:
                    yield f"{i}.{kind}.{name}", leaf


def initialize(config: ModelConfig, rank: int, seed: int) -> Factors:
    """Factors whose product is zero: `right` is uniform in +-1/sqrt(inputs), `left` is zero.

    It is always the factor with the elastic axis that starts at zero, whether it reads or writes: what few steps see,
    such as the entries that only rate 0 keeps, is then changed by those steps alone, however far the shared factor
    moves at the other rates. The same on every machine and JAX version.
    """
    rng = np.random.default_rng(seed)
    factors: Factors = {}
    for name, leaf in targets(config):
        *lead, width = elastic.shape(config, leaf)
        inputs = width if leaf.contract == "last" else math.prod(lead)
        right = jnp.asarray(rng.uniform(-1, 1, (rank, width)) / math.sqrt(inputs), jnp.float32)
        factors[name] = {"left": jnp.zeros((*lead, rank), jnp.float32), "right": right}
    return factors


def alpha_of(rank: int) -> float:
    """The paper's 16 at rank 8, and for other ranks what makes the sum of their updates grow no faster: alpha / rank
    falls with the root of the rank (Kalajdzievski, arXiv 2312.03732).
    """
    return 16.0 * math.sqrt(rank / 8)


def count(factors: Factors) -> int:
    """How many numbers are trained."""
    return sum(factor.size for factor in jax.tree.leaves(factors))


def attach(
    layers: Sequence[Layer],
    factors: Factors,
    alpha: float,
    dropout: float = 0.0,
    key: Key[Array, ""] | None = None,
) -> list[dict[str, dict[str, Any]]]:
    """The layers with a LoraArray for every weight that has factors; traceable, nothing is copied.

    With a key, `dropout` of what each low-rank path receives is dropped, differently for every leaf.
    """

    def beside(name: str, value: Any) -> Any:
        if name not in factors:
            return value
        own = None if key is None else jax.random.fold_in(key, zlib.crc32(name.encode()))
        left, right = factors[name]["left"], factors[name]["right"]
        return LoraArray(value, left, right, own, scale=alpha / right.shape[0], dropout=dropout)

    return [
        {
            kind: {name: beside(f"{i}.{kind}.{name}", value) for name, value in block.items()}
            for kind, block in layer.items()
        }
        for i, layer in enumerate(layers)
    ]


def merge_layer(i: int, layer: Layer, factors: Factors, alpha: float) -> dict[str, dict[str, Any]]:
    """Layer i with its update in its weights: matrices float32 numpy arrays, the rest as it was."""

    def merged(name: str, value: Any) -> Any:
        if name not in factors:
            return value
        left, right = factors[name]["left"], factors[name]["right"]
        done: Float[Array, "..."] = LoraArray(value, left, right, scale=alpha / right.shape[0]).merged()
        return np.asarray(done)

    return {
        kind: {name: merged(f"{i}.{kind}.{name}", value) for name, value in block.items()}
        for kind, block in layer.items()
    }


def packed_layer(
    config: ModelConfig, i: int, layer: Layer, factors: Factors, alpha: float
) -> dict[str, dict[str, Any]]:
    """Layer i of RoundedArrays as what is stored of them once their factors have moved them."""

    def settled(name: str, value: Any) -> Any:
        if not isinstance(value, RoundedArray):
            return value
        left, right = factors[name]["left"], factors[name]["right"]
        return dataclasses.replace(value, left=left, right=right, scale=alpha / right.shape[0]).quantized()

    done = {
        kind: {name: settled(f"{i}.{kind}.{name}", value) for name, value in block.items()}
        for kind, block in layer.items()
    }
    return {kind: reachable_bias(config, kind, block) for kind, block in done.items()}
