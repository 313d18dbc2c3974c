"""Grouped-query attention with pruned RoPE pairs and V/O ranks.

The softmax scale comes from the original head size, so masked, sliced and zero-padded heads give the same scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from uniql_jax import elastic
from uniql_jax.config import ModelConfig
from uniql_jax.model.cache import LayerCache
from uniql_jax.model.layers.context import Causal, Context
from uniql_jax.model.layers.linear import apply_columns, apply_rows
from uniql_jax.model.layers.norm import head_norm, rms_norm
from uniql_jax.pallas_kernels.attention import cached_attention, caches, causal_attention
from uniql_jax.pallas_kernels.attention.decode_reference import written
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
    k: Float[Array, "b t g dk"],
    v: Float[Array, "b t g dv"],
    visible: Causal,
) -> Float[Array, "b t dv n"]:
    """Softmax attention of tokens to themselves and those before them; scores and softmax in float32.

    A query that sees nothing (padding) gets zeros.
    """
    return causal_attention(q, k, v, visible.valid, scale=config.softmax_scale).swapaxes(2, 3)


def inner(
    config: ModelConfig, leaves: Leaves, normed: Float[Array, "b t h"], context: Context
) -> Float[Array, "b t vo n"]:
    """What o receives, over whole sequences."""
    assert isinstance(context.visible, Causal)
    return attend(config, *project(config, leaves, normed, context), context.visible)


def write(leaves: Leaves, hidden: Float[Array, "b t vo n"]) -> Float[Array, "b t h"]:
    """Back to the residual stream."""
    y = apply_columns(hidden, leaves["o"])
    return y + leaves["o_bias"].astype(y.dtype) if "o_bias" in leaves else y


def init_state(
    config: ModelConfig, keep: Mapping[str, int], batch: int, slots: int, dtype: DTypeLike, bits: int = 16
) -> LayerCache:
    """Empty keys and values, sized for the kept pairs and ranks; `bits` 8 holds them as int8, else in `dtype`."""
    shape = (batch, slots, config.kv_heads)
    width = elastic.sizes(config)["pair"] * keep["qk"] + keep.get("qk_pass", 0)
    held = jnp.int8 if bits == 8 else dtype
    state = LayerCache(k=jnp.zeros((*shape, width), held), v=jnp.zeros((*shape, keep["vo"]), held))
    if bits != 8:
        return state
    return LayerCache(state.k, state.v, jnp.zeros(shape, jnp.bfloat16), jnp.zeros(shape, jnp.bfloat16))


def cached_inner(
    config: ModelConfig, leaves: Leaves, normed: Float[Array, "b t h"], context: Context, state: LayerCache
) -> tuple[Float[Array, "b t vo n"], LayerCache]:
    """What o receives when earlier keys and values sit in the cache; the new ones are written from the slot on."""
    q, k, v = project(config, leaves, normed, context)
    state = LayerCache(*written(state.caches, k, v, context.slot))
    if isinstance(context.visible, Causal):
        k, v = (_as_held(x, state.k.dtype) for x in (k, v))
        return attend(config, q, k, v, context.visible), state
    start, scale = context.visible.start, config.softmax_scale
    return cached_attention(q, state.caches, start, context.slot, scale=scale).swapaxes(2, 3), state


def _as_held(x: Float[Array, "b t g d"], dtype: DTypeLike) -> Float[Array, "b t g d"]:
    """What later tokens will read of it, so that a first prompt sees the same."""
    if dtype == jnp.int8:
        return caches.dequantize(*caches.quantize(x), x.dtype)
    return x.astype(dtype).astype(x.dtype)
