"""Grouped-query attention with pruned RoPE pairs and V/O ranks.

The softmax scale comes from the original head size, so masked, sliced and zero-padded heads give the same scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from uniql_jax import elastic
from uniql_jax.config import ModelConfig
from uniql_jax.model.cache import LayerCache
from uniql_jax.model.layers.context import Causal, Context
from uniql_jax.model.layers.linear import apply_columns, apply_rows
from uniql_jax.model.layers.norm import head_norm, rms_norm
from uniql_jax.pallas_kernels.attention import causal_attention, masked_attention
from uniql_jax.pallas_kernels.rope import rope_qk

Leaves = Mapping[str, Any]


def read(config: ModelConfig, leaves: Leaves, x: Float[Array, "b t h"]) -> Float[Array, "b t h"]:
    """What q, k and v receive: the normed stream."""
    return rms_norm(x, leaves["norm"], config.norm_eps)


def project(
    config: ModelConfig, leaves: Leaves, normed: Float[Array, "b t h"], context: Context
) -> tuple[Float[Array, "b t n dk"], Float[Array, "b t g dk"], Float[Array, "b t g dv"]]:
    """Queries, keys (both rotated) and values per head, features in sorted order.

    Pairs are interleaved, features (2p, 2p + 1) being pair p, so that a pruned head is a prefix of the full one. With
    a partial rotary embedding the dimensions that it passes through follow.
    """
    q, k = apply_rows(normed, leaves["q"]), apply_rows(normed, leaves["k"])  # [b, t, qk, 2, heads]
    if "q_bias" in leaves:
        q, k = q + leaves["q_bias"].astype(q.dtype), k + leaves["k_bias"].astype(k.dtype)
    q, k = elastic.mask(q, context.keep, "qk", 2), elastic.mask(k, context.keep, "qk", 2)
    q, k = normed_heads(config, leaves, q, k)
    if "inv_freq" in leaves:
        q, k = rope_qk(q, k, context.positions, leaves["inv_freq"])
    v = elastic.mask(apply_rows(normed, leaves["v"]), context.keep, "vo", 2)  # [b, t, vo, kv heads]
    batch, length = normed.shape[:2]
    q = q.transpose(0, 1, 4, 2, 3).reshape(batch, length, config.heads, -1)
    k = k.transpose(0, 1, 4, 2, 3).reshape(batch, length, config.kv_heads, -1)
    if "q_pass" in leaves:
        q = jnp.concatenate([q, _passed(leaves, "q_pass", normed, context)], axis=-1)
        k = jnp.concatenate([k, _passed(leaves, "k_pass", normed, context)], axis=-1)
    return q, k, v.transpose(0, 1, 3, 2)


def normed_heads(
    config: ModelConfig, leaves: Leaves, q: Float[Array, "b t p w n"], k: Float[Array, "b t p w g"]
) -> tuple[Float[Array, "b t p w n"], Float[Array, "b t p w g"]]:
    """Queries and keys, each head divided by its root mean square and multiplied by learned gains, if there are any."""
    if "q_norm" not in leaves:
        return q, k
    size, eps = config.head_dim, config.norm_eps  # the original size: a pruned head is one with zeros in it
    return head_norm(q, leaves["q_norm"], size, eps), head_norm(k, leaves["k_norm"], size, eps)


def _passed(leaves: Leaves, name: str, normed: Array, context: Context) -> Float[Array, "b t n dp"]:
    """Dimensions of queries or keys that do not rotate."""
    y = apply_rows(normed, leaves[name])
    if f"{name}_bias" in leaves:
        y = y + leaves[f"{name}_bias"].astype(y.dtype)
    return elastic.mask(y, context.keep, "qk_pass", 2).transpose(0, 1, 3, 2)


def attend(
    config: ModelConfig,
    q: Float[Array, "b t n dk"],
    k: Float[Array, "b s g dk"],
    v: Float[Array, "b s g dv"],
    visible: Causal | Bool[Array, "b t s"],
) -> Float[Array, "b t dv n"]:
    """Softmax attention; scores and softmax in float32. `visible[b, t, s]` says that query t may see key s.

    With `Causal` keys and values are those of the queries' tokens. A query that sees nothing (padding) gets zeros.
    """
    scale = config.softmax_scale
    if isinstance(visible, Causal):
        out = causal_attention(q, k, v, visible.valid, scale=scale)
    else:
        out = masked_attention(q, k, v, visible, scale=scale)
    return out.swapaxes(2, 3)


def inner(
    config: ModelConfig, leaves: Leaves, normed: Float[Array, "b t h"], context: Context
) -> Float[Array, "b t vo n"]:
    """What o receives, over whole sequences."""
    return attend(config, *project(config, leaves, normed, context), context.visible)


def write(leaves: Leaves, hidden: Float[Array, "b t vo n"]) -> Float[Array, "b t h"]:
    """Back to the residual stream."""
    y = apply_columns(hidden, leaves["o"])
    return y + leaves["o_bias"].astype(y.dtype) if "o_bias" in leaves else y


def init_state(config: ModelConfig, keep: Mapping[str, int], batch: int, slots: int, dtype: DTypeLike) -> LayerCache:
    """Empty keys and values, sized for the kept pairs and ranks."""
    shape = (batch, slots, config.kv_heads)
    width = elastic.sizes(config)["pair"] * keep["qk"] + keep.get("qk_pass", 0)
    return LayerCache(k=jnp.zeros((*shape, width), dtype), v=jnp.zeros((*shape, keep["vo"]), dtype))


def cached_inner(
    config: ModelConfig, leaves: Leaves, normed: Float[Array, "b t h"], context: Context, state: LayerCache
) -> tuple[Float[Array, "b t vo n"], LayerCache]:
    """What o receives when earlier keys and values sit in the cache; the new ones are written from the slot on."""
    q, k, v = project(config, leaves, normed, context)
    k, v = k.astype(state.k.dtype), v.astype(state.v.dtype)  # a first prompt sees what later ones will
    start = (0, context.slot, 0, 0)
    state = LayerCache(
        k=jax.lax.dynamic_update_slice(state.k, k, start),
        v=jax.lax.dynamic_update_slice(state.v, v, start),
    )
    if not isinstance(context.visible, Causal):
        k, v = state.k, state.v
    return attend(config, q, k.astype(q.dtype), v.astype(q.dtype), context.visible), state
