"""Blocks completed from what a checkpoint holds: value biases folded into o_bias, RoPE frequencies from the config."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from uniql_jax import elastic
from uniql_jax.casting import cast
from uniql_jax.config import ModelConfig
from uniql_jax.convert import tables

Leaves = dict[str, Float[np.ndarray, "..."]]


def _widened(
    config: ModelConfig, table: tuple[tables.Row, ...], kind: str, tensors: dict[str, Array]
) -> dict[str, Array]:
    leaves: dict[str, Array] = {}
    for row in tables.rows_of(config, table, kind):
        found = tables.laid_out(config, row, tensors[row.name])
        leaves.update({name: value.astype(jnp.float32) for name, value in found.items()})
    return leaves


@functools.partial(jax.jit, static_argnames=("config", "table"))
def top_on_device(config: ModelConfig, table: tuple[tables.Row, ...], raw: dict[str, Array]) -> dict[str, Array]:
    """Embedding, norm and head, float32, from their foreign tensors {name of the row: tensor as stored}."""
    return folded_top(config, _widened(config, table, "top", raw))


def top_factors(config: ModelConfig, tied: bool) -> dict[str, float]:
    """What the embedding and the final norm of a checkpoint are multiplied by, so that nothing else need be scaled.

    Args:
        config: the model.
        tied: whether the embedding is the head as well; the norm then takes back what the embedding is scaled by.
    """
    return {"embed": config.embed_scale, "norm": config.logit_scale / (config.embed_scale if tied else 1.0)}


def pass_factors(config: ModelConfig) -> dict[str, float]:
    """What leaves of dimensions that do not rotate are multiplied by: scores are scaled as if all of a head did."""
    if config.rope is None or config.rope.attention_factor == 1.0:
        return {}
    names = ("q_pass", "k_pass", "q_pass_bias", "k_pass_bias")
    return dict.fromkeys(names, 1.0 / config.rope.attention_factor)


def folded_top(config: ModelConfig, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Embedding, final norm and head with the scales of the embedding and of the logits in them."""
    factors = top_factors(config, "head" not in leaves)
    return {name: value if factors.get(name, 1.0) == 1.0 else value * factors[name] for name, value in leaves.items()}


@functools.partial(jax.jit, static_argnames=("config", "table"))
def complete_on_device(
    config: ModelConfig, table: tuple[tables.Row, ...], raw: dict[str, dict[str, Array]], inv_freq: Array
) -> dict[str, dict[str, Array]]:
    """A layer from its foreign tensors, laid out, widened and completed on the device.

    Args:
        config: the model.
        table: which tensor is which leaf.
        raw: {kind: {name of the row: tensor as stored}}.
        inv_freq: `config.inv_freq` of this layer.

    Returns:
        {kind: {leaf: array}}, float32.
    """
    layer = {}
    for kind, tensors in raw.items():
        leaves = _widened(config, table, kind, tensors)
        wanted = elastic.leaves(config, kind)
        leaves |= {name: leaves[name] * factor for name, factor in pass_factors(config).items() if name in leaves}
        if "v_bias" in leaves:
            v_bias = jnp.repeat(leaves["v_bias"], config.query_groups, axis=1)  # [vo, head]
            folded = jnp.einsum("vn,vnh->h", v_bias, leaves["o"], precision="highest")
            leaves["o_bias"] = folded + leaves.get("o_bias", 0.0)
        if "inv_freq" in wanted:
            leaves["inv_freq"] = jnp.broadcast_to(inv_freq[:, None], elastic.shape(config, wanted["inv_freq"]))
        layer[kind] = {name: leaves[name] for name in wanted}
    return layer


def complete(config: ModelConfig, kind: str, leaves: Leaves, where: str, layer: int) -> Leaves:
    """Add the leaves that follow from others or from the config, drop the raw ones, and put them in our order.

    Args:
        config: the model.
        kind: of the block.
        leaves: those that its tensors hold, float32.
        where: names the block, for errors.
        layer: its number.

    Raises:
        UserError: a folded bias lies beyond the range of float32.
    """
    wanted = elastic.leaves(config, kind)
    for name, factor in pass_factors(config).items():
        if name in leaves:
            leaves[name] = leaves[name] * np.float32(factor)
    if "v_bias" in leaves:
        v_bias = np.repeat(leaves["v_bias"].astype(np.float64), config.query_groups, axis=1)  # [vo, head]
        folded = np.tensordot(v_bias, leaves["o"].astype(np.float64), 2)
        leaves["o_bias"] = cast(f"{where}.o_bias", folded + leaves.get("o_bias", 0.0), np.float32)
    if "inv_freq" in wanted:
        shape = elastic.shape(config, wanted["inv_freq"])
        leaves["inv_freq"] = np.ascontiguousarray(np.broadcast_to(config.inv_freq(layer)[:, None], shape))
    return {name: leaves[name] for name in wanted}
