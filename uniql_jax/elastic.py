"""The one mechanism: every prunable weight is stored with its sorted axis first, and pruning keeps a prefix of it.

`BLOCKS` is the whole truth about every leaf of every block: its dimensions, which of them is elastic (always the
first) and which a matrix product contracts. Sorting, masking, slicing, quantizing, caches, export and tests read it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from uniql_jax.config import ModelConfig

AXES = ("ffn", "qk", "vo")
"""The elastic axes: MLP channels, RoPE pairs of Q and K, ranks of the V/O product."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One tensor of a block: its named dimensions, and the trailing or leading ones a matrix product contracts.

    `contract` is "last" for weights applied as rows (y = W x over the last dimension), "first" for weights whose
    contracted dimensions lead (y = x W over all but the last), None for vectors, which stay in float32 or as they are.
    """

    dims: tuple[str, ...]
    contract: str | None = None

    @property
    def axis(self) -> str | None:
        """The elastic axis this leaf is sorted and pruned along, or None."""
        return self.dims[0] if self.dims[0] in AXES else None


BLOCKS: dict[str, dict[str, Leaf]] = {
    "attention": {
        "norm": Leaf(("embed",)),
        "q": Leaf(("qk", "pair", "head", "embed"), "last"),
        "k": Leaf(("qk", "pair", "kv_head", "embed"), "last"),
        "q_bias": Leaf(("qk", "pair", "head")),
        "k_bias": Leaf(("qk", "pair", "kv_head")),
        "inv_freq": Leaf(("qk", "kv_head")),
        "v": Leaf(("vo", "kv_head", "embed"), "last"),
        "o": Leaf(("vo", "head", "embed"), "first"),
        "o_bias": Leaf(("embed",)),
    },
    "mlp": {
        "norm": Leaf(("embed",)),
        "gate": Leaf(("ffn", "embed"), "last"),
        "up": Leaf(("ffn", "embed"), "last"),
        "gate_bias": Leaf(("ffn",)),
        "up_bias": Leaf(("ffn",)),
        "down": Leaf(("ffn", "embed"), "first"),
        "down_bias": Leaf(("embed",)),
    },
}

TOP: dict[str, Leaf] = {
    "embed": Leaf(("vocab", "embed"), "last"),
    "norm": Leaf(("embed",)),
    "head_in": Leaf(("embed", "embed"), "first"),
    "head": Leaf(("vocab", "embed"), "last"),
}
"""Leaves outside the layers. `head` is absent when the embedding serves as the head; `head_in` is the square matrix a
rotated model applies to the normed stream so that one rotated embedding can serve both (method: one copy for two)."""

Keep = Mapping[str, int | jax.Array]
"""Kept sizes of one layer, axis -> count. A traced array (also one per sample, [batch]) masks instead of slicing."""


def sizes(config: ModelConfig) -> dict[str, int]:
    """Full size of every named dimension."""
    return {
        "embed": config.hidden_size,
        "vocab": config.vocab_size,
        "head": config.heads,
        "kv_head": config.kv_heads,
        "pair": 2,
        "ffn": config.intermediate_size,
        "qk": config.head_dim // 2,
        "vo": config.head_dim,
    }


def leaves(config: ModelConfig, kind: str) -> dict[str, Leaf]:
    """The leaves that a block of this kind has in this model (biases only where the model has them).

    A value bias never appears: softmax weights sum to one, so it is folded into o_bias exactly.
    """
    present = {
        "q_bias": config.qkv_bias,
        "k_bias": config.qkv_bias,
        "o_bias": config.qkv_bias or config.o_bias,
        "gate_bias": config.mlp_bias,
        "up_bias": config.mlp_bias,
        "down_bias": config.mlp_bias,
        "inv_freq": config.rope is not None,
    }
    return {name: leaf for name, leaf in BLOCKS[kind].items() if present.get(name, True)}


def shape(config: ModelConfig, leaf: Leaf, keep: Mapping[str, int] | None = None) -> tuple[int, ...]:
    """Shape of a leaf at the kept sizes (all of them when `keep` is None)."""
    full = sizes(config) | dict(keep or {})
    return tuple(full[dim] for dim in leaf.dims)


def layer_axes(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The elastic axes of a layer made of these blocks."""
    return tuple(a for a in AXES if any(leaf.axis == a for kind in kinds for leaf in BLOCKS[kind].values()))


def axis_cost(config: ModelConfig, kinds: tuple[str, ...], axis: str) -> int:
    """Parameters that one step along an elastic axis holds in a layer (matrices only)."""
    full = sizes(config)
    return sum(
        math.prod(full[d] for d in leaf.dims[1:])
        for kind in kinds
        for leaf in BLOCKS[kind].values()
        if leaf.axis == axis and leaf.contract
    )


def slice_leaf(leaf: Leaf, value: Any, keep: Mapping[str, int]) -> Any:
    """Keep the leading part of one leaf, array or packed; a leaf without an elastic axis passes unchanged."""
    if leaf.axis is None or leaf.axis not in keep:
        return value
    count = int(keep[leaf.axis])
    return value.take_prefix(count) if hasattr(value, "take_prefix") else value[:count]


def slice_layer(layer: Mapping[str, Mapping[str, Any]], keep: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Keep the leading part of every leaf of a layer {kind: {leaf: value}}."""
    return {
        kind: {name: slice_leaf(BLOCKS[kind][name], value, keep) for name, value in block.items()}
        for kind, block in layer.items()
    }


def mask(x: Shaped[Array, "..."], keep: Keep | None, axis: str, dim: int) -> Shaped[Array, "..."]:
    """Zero what a prune would cut: entries of dimension `dim` of x at or beyond keep[axis].

    keep[axis] may be a scalar or one count per sample (x's first dimension); without it x passes unchanged.
    """
    if keep is None or axis not in keep:
        return x
    count: Int[Array, "..."] = jnp.asarray(keep[axis])
    dim = dim % x.ndim
    iota = jax.lax.broadcasted_iota(jnp.int32, (1,) * dim + (x.shape[dim],) + (1,) * (x.ndim - dim - 1), dim)
    limit = count.reshape(count.shape + (1,) * (x.ndim - count.ndim)) if count.ndim else count
    return jnp.where(iota < limit, x, jnp.zeros((), x.dtype))
