"""The one mechanism: every prunable weight is stored with its sorted axis first, and pruning keeps a prefix of it.

`BLOCKS` is the whole truth about every leaf of every block: its dimensions, which of them is elastic (always the
first) and which a matrix product contracts. Sorting, masking, slicing, quantizing, caches, export and tests read it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from uniql_jax.config import ModelConfig

AXES = ("ffn", "qk", "qk_pass", "vo", "ssm_head", "ssm_state")
"""The elastic axes: MLP channels, RoPE pairs of Q and K (plain dimensions where nothing rotates), dimensions of Q and K
that a partial rotary embedding passes through, ranks of the V/O product, channels of an SSM head, SSM states."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One tensor of a block: its named dimensions, and the trailing or leading ones a matrix product contracts.

    `contract` is "last" for weights applied as rows (y = W x over the last dimension), "first" for weights whose
    contracted dimensions lead (y = x W over all but the last), None for vectors, which stay in float32 or as they are.
    Along `shared` a model has one value for all: there is a copy for each only since each head has its own order.
    """

    dims: tuple[str, ...]
    contract: str | None = None
    shared: tuple[str, ...] = ()

    @functools.cached_property
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
        "q_norm": Leaf(("qk", "pair", "head"), shared=("head",)),
        "k_norm": Leaf(("qk", "pair", "kv_head"), shared=("kv_head",)),
        "inv_freq": Leaf(("qk", "kv_head"), shared=("kv_head",)),
        "q_pass": Leaf(("qk_pass", "head", "embed"), "last"),
        "k_pass": Leaf(("qk_pass", "kv_head", "embed"), "last"),
        "q_pass_bias": Leaf(("qk_pass", "head")),
        "k_pass_bias": Leaf(("qk_pass", "kv_head")),
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
    "mamba2": {
        "norm": Leaf(("embed",)),
        "z": Leaf(("ssm_head", "mamba_head", "embed"), "last"),
        "x": Leaf(("ssm_head", "mamba_head", "embed"), "last"),
        "b": Leaf(("ssm_state", "mamba_group", "embed"), "last"),
        "c": Leaf(("ssm_state", "mamba_group", "embed"), "last"),
        "dt": Leaf(("mamba_head", "embed"), "last"),
        "z_bias": Leaf(("ssm_head", "mamba_head")),
        "x_bias": Leaf(("ssm_head", "mamba_head")),
        "b_bias": Leaf(("ssm_state", "mamba_group")),
        "c_bias": Leaf(("ssm_state", "mamba_group")),
        "dt_proj_bias": Leaf(("mamba_head",)),
        "conv_x": Leaf(("ssm_head", "mamba_head", "conv")),
        "conv_b": Leaf(("ssm_state", "mamba_group", "conv")),
        "conv_c": Leaf(("ssm_state", "mamba_group", "conv")),
        "conv_x_bias": Leaf(("ssm_head", "mamba_head")),
        "conv_b_bias": Leaf(("ssm_state", "mamba_group")),
        "conv_c_bias": Leaf(("ssm_state", "mamba_group")),
        "dt_bias": Leaf(("mamba_head",)),
        "a_log": Leaf(("mamba_head",)),
        "d": Leaf(("mamba_head",)),
        "gate_norm": Leaf(("ssm_head", "mamba_head")),
        "out": Leaf(("ssm_head", "mamba_head", "embed"), "first"),
        "out_bias": Leaf(("embed",)),
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


@functools.cache
def sizes(config: ModelConfig) -> Mapping[str, int]:
    """Full size of every named dimension (0 for those of a block the model has not)."""
    rotary, ssm = config.rope.dim if config.rope else 0, config.ssm
    found = {
        "embed": config.hidden_size,
        "vocab": config.vocab_size,
        "head": config.heads,
        "kv_head": config.kv_heads,
        "pair": 2 if rotary else 1,
        "ffn": config.intermediate_size,
        "qk": rotary // 2 if rotary else config.head_dim,
        "qk_pass": config.head_dim - rotary if rotary else 0,
        "vo": config.head_dim,
        "mamba_head": ssm.heads if ssm else 0,
        "mamba_group": ssm.groups if ssm else 0,
        "ssm_head": ssm.head_dim if ssm else 0,
        "ssm_state": ssm.state if ssm else 0,
        "conv": ssm.conv if ssm else 0,
    }
    return MappingProxyType(found)


@functools.cache
def leaves(config: ModelConfig, kind: str) -> Mapping[str, Leaf]:
    """The leaves that a block of this kind has in this model (biases and the like only where the model has them).

    A value bias never appears: softmax weights sum to one, so it is folded into o_bias exactly.
    """
    ssm, partial = config.ssm, sizes(config)["qk_pass"] > 0
    present = dict.fromkeys(("q_bias", "k_bias"), config.qkv_bias)
    present |= {"o_bias": config.qkv_bias or config.o_bias, "inv_freq": config.rope is not None}
    present |= dict.fromkeys(("q_norm", "k_norm"), config.qk_norm)
    present |= dict.fromkeys(("q_pass", "k_pass"), partial)
    present |= dict.fromkeys(("q_pass_bias", "k_pass_bias"), partial and config.qkv_bias)
    present |= {"gate": config.gated_mlp, "gate_bias": config.gated_mlp and config.mlp_bias}
    present |= dict.fromkeys(("up_bias", "down_bias"), config.mlp_bias)
    projections = ("z_bias", "x_bias", "b_bias", "c_bias", "dt_proj_bias", "out_bias")
    present |= dict.fromkeys(projections, ssm is not None and ssm.bias)
    present |= dict.fromkeys(("conv_x_bias", "conv_b_bias", "conv_c_bias"), ssm is not None and ssm.conv_bias)
    return MappingProxyType({name: leaf for name, leaf in BLOCKS[kind].items() if present.get(name, True)})


def shape(config: ModelConfig, leaf: Leaf, keep: Mapping[str, int] | None = None) -> tuple[int, ...]:
    """Shape of a leaf.

    Args:
        config: the model.
        leaf: a row of `BLOCKS` or `TOP`.
        keep: kept size of each elastic axis; an axis that is missing has its full size.

    Returns:
        The size of every dimension of the leaf.
    """
    full = {**sizes(config), **keep} if keep else sizes(config)
    return tuple(full[dim] for dim in leaf.dims)


def parameters(config: ModelConfig, leaf: Leaf, keep: Mapping[str, int] | None = None) -> int:
    """Parameters of a leaf at these kept sizes; what heads share counts once."""
    sized = zip(leaf.dims, shape(config, leaf, keep), strict=True)
    return math.prod(size for dim, size in sized if dim not in leaf.shared)


@functools.cache
def layer_axes(config: ModelConfig, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The elastic axes of a layer made of these blocks."""
    found = {leaf.axis for kind in kinds for leaf in leaves(config, kind).values()}
    return tuple(axis for axis in AXES if axis in found)


@functools.cache
def axis_cost(config: ModelConfig, kinds: tuple[str, ...], axis: str) -> int:
    """Parameters that one step along an elastic axis holds in a layer (matrices only)."""
    full = sizes(config)
    return sum(
        math.prod(full[d] for d in leaf.dims[1:])
        for kind in kinds
        for leaf in leaves(config, kind).values()
        if leaf.axis == axis and leaf.contract
    )


def slice_leaf(leaf: Leaf, value: Any, keep: Mapping[str, int]) -> Any:
    """Keep the leading part of one leaf; a leaf without an elastic axis passes unchanged.

    Args:
        leaf: the row of `BLOCKS` that describes it.
        value: a plain array or a `Weight`.
        keep: kept size of each elastic axis.

    Returns:
        A prefix of `value` along its leading axis, of the same type.
    """
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


def reorder(
    config: ModelConfig, kind: str, block: Mapping[str, Any], axis: str, orders: Mapping[str, Int[Array, "n heads"]]
) -> dict[str, Any]:
    """Permute one elastic axis of a block.

    Args:
        config: the model.
        kind: the block's kind, a key of `BLOCKS`.
        block: its leaves.
        axis: the elastic axis.
        orders: for every dimension of heads that a leaf of this axis may have, an order per head, int [size, heads].

    Returns:
        The block with the leaves of this axis permuted along it.
    """
    out = dict(block)
    for name, leaf in leaves(config, kind).items():
        if leaf.axis != axis:
            continue
        heads = next(dim for dim in leaf.dims if dim in orders)
        order, place = orders[heads], leaf.dims.index(heads)
        shape = [order.shape[d == place] if d in (0, place) else 1 for d in range(len(leaf.dims))]
        out[name] = jnp.take_along_axis(jnp.asarray(block[name]), order.reshape(shape), axis=0)
    return out


def mask(x: Shaped[Array, "..."], keep: Keep | None, axis: str, dim: int) -> Shaped[Array, "..."]:
    """Zero what a prune would cut: entries of dimension `dim` of x at or beyond keep[axis].

    Args:
        x: activations.
        keep: axis -> kept size, a scalar or one count per sample (x's first dimension); may be traced.
        axis: the elastic axis; where `keep` lacks it, x passes unchanged.
        dim: the dimension of x that runs along the axis.

    Returns:
        x with zeros there, of the same shape and dtype.
    """
    if keep is None or axis not in keep:
        return x
    count: Int[Array, "..."] = jnp.asarray(keep[axis])
    dim = dim % x.ndim
    iota = jax.lax.broadcasted_iota(jnp.int32, (1,) * dim + (x.shape[dim],) + (1,) * (x.ndim - dim - 1), dim)
    limit = count.reshape(count.shape + (1,) * (x.ndim - count.ndim)) if count.ndim else count
    return jnp.where(iota < limit, x, jnp.zeros((), x.dtype))
