"""Measuring and sorting attention blocks: RoPE pairs, dimensions that do not rotate, V/O ranks."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from uniql_jax import elastic
from uniql_jax.compiling import jit
from uniql_jax.compression.math.gram import gram
from uniql_jax.compression.math.order import tail_loss
from uniql_jax.compression.math.rope_pairs import order_pairs
from uniql_jax.compression.math.value_output import rank_loss, sort_value_output
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.compression.sorters.base import Block, Seed, Sorted, Sorter, Statistics, Taps
from uniql_jax.config import ModelConfig
from uniql_jax.model.layers import attention
from uniql_jax.model.layers.context import Causal, Context


def _taps(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {"q": (config.heads, config.head_dim)}


def _run(config: ModelConfig, leaves: Block, normed: Array, context: Context, taps: Taps) -> tuple[Array, Any]:
    q, k, v = attention.project(config, leaves, normed, context)
    q = q + taps["q"]
    assert isinstance(context.visible, Causal)  # whole windows
    return attention.attend(config, q, k, v, context.visible), (q, k)


def _parts(config: ModelConfig) -> dict[str, tuple[slice, slice, int]]:
    """Axis -> its features in a head, its entries among all of a head's, and how many features an entry spans."""
    full = elastic.sizes(config)
    pairs, passed, pair = full["qk"], full["qk_pass"], full["pair"]
    parts = {"qk": (slice(0, pair * pairs), slice(0, pairs), pair)}
    if passed:
        parts["qk_pass"] = (slice(pair * pairs, pair * pairs + passed), slice(pairs, pairs + passed), 1)
    return parts


def _statistics(
    config: ModelConfig, normed: Array, hidden: Array, seen: Any, slopes: Taps, thorough: bool
) -> Statistics:
    q, k = seen
    shape = (*q.shape[:2], config.kv_heads, config.query_groups)
    grouped = q.reshape(*shape, -1)
    centred = k - jnp.mean(k, axis=1, keepdims=True)
    received = hidden.reshape(*hidden.shape[:3], *shape[2:])
    change = (q * slopes["q"]).reshape(*shape, -1)
    felt = [change[..., at].reshape(*shape, -1, width).sum((3, 5)) for at, _, width in _parts(config).values()]
    felt = jnp.concatenate(felt, axis=-1)  # [b, t, g, entries]
    return {
        "gram_x": gram(normed, config.hidden_size),
        "gram_q": jnp.einsum("btgmi,btgmj->gmij", grouped, grouped),
        "gram_k": jnp.einsum("btgi,btgj->gij", centred, centred),
        "gram_out": jnp.einsum("btigm,btjgm->gij", received, received),
        "gate_fisher": jnp.einsum("btgi,btgj->gij", felt, felt),
    }


def _sort(config: ModelConfig, leaves: Block, stats: Statistics, options: CompressionSettings, seed: Seed) -> Sorted:
    out, losses = _sort_pairs(config, leaves, stats, options, seed)
    metric = stats["fisher"] if options.output_metric else None
    change, out["v"], out["o"] = sort_value_output(
        leaves["v"], leaves["o"], stats["gram_out"], stats["gram_x"], options.value_output, seed, metric
    )
    losses["vo"] = rank_loss(change, out["o"], stats["gram_out"], stats["fisher"])
    return out, losses


@functools.partial(jit, static_argnames=("config", "options"))
def _sort_pairs(
    config: ModelConfig, leaves: Block, stats: Statistics, options: CompressionSettings, seed: Seed
) -> Sorted:
    out, losses = dict(leaves), {}
    for axis, (features, entries, width) in _parts(config).items():
        gate_fisher = stats["gate_fisher"][:, entries, entries]
        order = order_pairs(
            stats["gram_q"][:, :, features, features],
            stats["gram_k"][:, features, features],
            options.pair_score,
            seed,
            gate_fisher,
            width=width,
        )  # [entries, g]
        by_head = {"head": jnp.repeat(order, config.query_groups, axis=1), "kv_head": order}
        out = elastic.reorder(config, "attention", out, axis, by_head)
        ordered = jax.vmap(lambda loss, index: loss[index][:, index])(gate_fisher, order.T)
        losses[axis] = tail_loss(ordered).sum(0)
    return out, losses


SORTER = Sorter(_taps, _run, _statistics, _sort)
