"""First pass, layer by layer: gather statistics on calibration windows, then bring every elastic axis into order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax import elastic
from uniql_jax.config import ModelConfig
from uniql_jax.layers import KINDS, attention
from uniql_jax.layers.context import Context, full_context
from uniql_jax.passes.options import Options
from uniql_jax.sort.mlp import order_channels
from uniql_jax.sort.rope_pairs import order_pairs
from uniql_jax.sort.value_output import sort_value_output

Statistics = dict[str, Array]
Block = Mapping[str, Any]


def gram(x: Float[Array, "..."], width: int) -> Float[Array, "w w"]:
    """Sum of outer products of the rows of x seen as [rows, width], float32."""
    rows = x.astype(jnp.float32).reshape(-1, width)
    return rows.T @ rows


def _attention_statistics(config: ModelConfig, leaves: Block, normed: Array, context: Context) -> tuple[Array, Any]:
    q, k, v = attention.project(config, leaves, normed, context)
    hidden = attention.attend(config, q, k, v, context.visible)
    shape = (*q.shape[:2], config.kv_heads, config.query_groups)
    grouped = q.reshape(*shape, -1)
    centred = k - jnp.mean(k, axis=1, keepdims=True)
    received = hidden.reshape(*hidden.shape[:3], *shape[2:])
    return hidden, {
        "gram_x": gram(normed, config.hidden_size),
        "gram_q": jnp.einsum("btgmi,btgmj->gmij", grouped, grouped),
        "gram_k": jnp.einsum("btgi,btgj->gij", centred, centred),
        "gram_out": jnp.einsum("btigm,btjgm->gij", received, received),
    }


def _sort_attention(config: ModelConfig, leaves: Block, stats: Statistics, options: Options, seed: int) -> Block:
    order = order_pairs(stats["gram_q"], stats["gram_k"], options.pair_score, seed)  # [pairs, g]
    by_head = jnp.repeat(order, config.query_groups, axis=1)
    out = dict(leaves)
    for name, leaf in elastic.leaves(config, "attention").items():
        if leaf.axis == "qk":
            index = by_head if "head" in leaf.dims else order
            place = leaf.dims.index("head" if "head" in leaf.dims else "kv_head")
            shape = [1] * len(leaf.dims)
            shape[0], shape[place] = index.shape
            out[name] = jnp.take_along_axis(leaves[name], index.reshape(shape), axis=0)
    out["v"], out["o"] = sort_value_output(
        leaves["v"], leaves["o"], stats["gram_out"], stats["gram_x"], options.value_output, seed
    )
    return out


def _mlp_statistics(config: ModelConfig, leaves: Block, normed: Array, context: Context) -> tuple[Array, Any]:
    hidden = KINDS["mlp"].inner(config, leaves, normed, context)
    return hidden, {"gram": gram(hidden, hidden.shape[-1])}


def _sort_mlp(config: ModelConfig, leaves: Block, stats: Statistics, options: Options, seed: int) -> Block:
    order = order_channels(stats["gram"], leaves["down"], options.mlp_score, seed)
    return {
        name: value[order] if elastic.BLOCKS["mlp"][name].axis == "ffn" else value for name, value in leaves.items()
    }


SORTERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "attention": (_attention_statistics, _sort_attention),
    "mlp": (_mlp_statistics, _sort_mlp),
}
"""Block kind -> (statistics of a batch, sorted leaves from their mean)."""


@functools.partial(jax.jit, static_argnames=("config", "kinds"))
def layer_statistics(
    config: ModelConfig, kinds: tuple[str, ...], layer: Mapping[str, Block], x: Float[Array, "b t h"]
) -> tuple[Float[Array, "b t h"], dict[str, Statistics], Float[Array, ""]]:
    """One batch of windows through a layer: its output, summed statistics per block, and the sum over tokens of the
    cosine between the layer's input and output (block influence is one minus its mean)."""
    context = full_context(jnp.ones(x.shape[:2], bool))
    before, found = x, {}
    for kind in kinds:
        block = KINDS[kind]
        hidden, found[kind] = SORTERS[kind][0](config, layer[kind], block.read(config, layer[kind], x), context)
        x = x + block.write(layer[kind], hidden)
    norms = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(x, axis=-1)
    return x, found, jnp.sum(jnp.sum(before * x, axis=-1) / jnp.maximum(norms, 1e-30))


@functools.partial(jax.jit, static_argnames=("config", "kinds", "options"))
def sort_layer(
    config: ModelConfig,
    kinds: tuple[str, ...],
    layer: Mapping[str, Block],
    stats: Mapping[str, Statistics],
    options: Options,
    seed: Int[Array, ""] | int = 0,
) -> dict[str, Block]:
    """The layer with every elastic axis sorted, most important first; `stats` are means over tokens."""
    return {kind: SORTERS[kind][1](config, layer[kind], stats[kind], options, seed) for kind in kinds}


@functools.partial(jax.jit, static_argnames=("eps",))
def final_gram(x: Float[Array, "b t h"], eps: float) -> Float[Array, "h h"]:
    """Summed Gram matrix of the final norm's output before its weight: what the head will read."""
    unit = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return gram(unit, x.shape[-1])
