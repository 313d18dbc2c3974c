"""Decoding with a cache: prompts are read once, then one token at a time. No family is named here."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from uniql_jax.config import ModelConfig
from uniql_jax.model.cache import Cache
from uniql_jax.model.causal_lm import CausalLM, embed, embed_stream, head_input, logits
from uniql_jax.model.layers import KINDS, fused
from uniql_jax.model.layers.context import Causal, Context
from uniql_jax.model.layers.norm import rms_norm
from uniql_jax.model.parallel import on_every_device, placed


def init_cache(model: CausalLM, batch: int, length: int) -> Cache:
    """An empty cache, sized for what this model keeps at its prune rate.

    Args:
        model: the model that will fill it.
        batch: sequences.
        length: tokens per sequence, prompt and new ones together.

    Returns:
        Keys, values and states of every layer in the model's dtype, `valid` bool [batch, length], `position` int32
        [batch] and `slot` int32.
    """
    if model.split is None:
        return empty_cache(model.config, model.keep, batch, length, model.dtype)
    return placed(empty_cache(model.split.whole_config(), model.keep, batch, length, model.dtype), model.split)


def empty_cache(config: ModelConfig, keep: Sequence[Mapping[str, int]], batch: int, length: int, dtype: Any) -> Cache:
    """`init_cache` from the kept sizes of every layer."""
    return Cache(
        layers=tuple(
            {kind: KINDS[kind].init_state(config, kept, batch, length, dtype) for kind in kinds}
            for kinds, kept in zip(config.pattern, keep, strict=True)
        ),
        valid=jnp.zeros((batch, length), bool),
        position=jnp.zeros((batch,), jnp.int32),
        slot=jnp.zeros((), jnp.int32),
        empty=True,
    )


def cache_bytes(
    config: ModelConfig, keep: Sequence[Mapping[str, int]], batch: int, length: int, dtype: Any = jnp.bfloat16
) -> int:
    """Bytes that decoding remembers at these kept sizes: keys and values, convolution inputs, SSM states."""
    found = jax.eval_shape(lambda: empty_cache(config, keep, batch, length, dtype).layers)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(found))


def _extend(
    model: CausalLM, tokens: Int[Array, "b t"], valid: Bool[Array, "b t"], cache: Cache, own: Causal | None = None
) -> tuple[Float[Array, "b t h"], Cache]:
    """Run tokens through all layers, reading and extending the cache; with `own` they see one another only."""
    length, slots = tokens.shape[1], cache.valid.shape[1]
    positions = jnp.maximum(cache.position[:, None] + jnp.cumsum(valid.astype(jnp.int32), axis=1) - 1, 0)
    filled = jax.lax.dynamic_update_slice(cache.valid, valid, (0, cache.slot))
    order = jnp.arange(slots)[None, :] <= cache.slot + jnp.arange(length)[:, None]
    context = Context(positions, own or filled[:, None, :] & order[None], valid, cache.slot)
    x = embed_stream(model, tokens)
    layers = []
    for kinds, layer, before in zip(model.config.pattern, model.params["layers"], cache.layers, strict=True):
        after = {}
        for kind in kinds:
            block, leaves = KINDS[kind], layer[kind]
            normed = block.read(model.config, leaves, x).astype(model.dtype)
            hidden, after[kind] = block.cached_inner(model.config, leaves, normed, context, before[kind])
            x = x + block.write(leaves, hidden)
        layers.append(after)
    return x, Cache(
        layers=tuple(layers),
        valid=filled,
        position=cache.position + valid.sum(axis=1, dtype=jnp.int32),
        slot=cache.slot + length,
    )


def prefill(
    model: CausalLM, tokens: Int[Array, "b t"], attention_mask: Int[Array, "b t"] | None, cache: Cache
) -> tuple[Float[Array, "b vocab"], Cache]:
    """Read prompts into the cache.

    Args:
        model: the model, at any prune rate.
        tokens: int32 token ids, padded on the left where the prompts differ in length.
        attention_mask: 1 on tokens and 0 on padding; None where nothing is padded.
        cache: as `init_cache` or an earlier `prefill` returns it, with room for the prompts.

    Returns:
        The logits after the last position, float32, and the cache with the prompts in it.
    """
    if model.split is not None:
        return _spread(prefill, model, tokens, attention_mask, cache)
    valid = jnp.ones(tokens.shape, bool) if attention_mask is None else attention_mask.astype(bool)
    own = Causal(None if attention_mask is None else valid) if cache.empty else None
    x, cache = _extend(model, tokens, valid, cache, own)
    return logits(model, x[:, -1]), cache


def decode(model: CausalLM, token: Int[Array, " b"], cache: Cache) -> tuple[Float[Array, "b vocab"], Cache]:
    """Feed one more token of every sequence.

    Args:
        model: the model that filled the cache.
        token: int32 token ids, one per sequence.
        cache: as `prefill` or an earlier `decode` returns it, with a free slot.

    Returns:
        The logits that follow the token, float32, and the cache with the token in it.
    """
    if model.split is not None:
        return _spread(decode, model, token, cache)
    if fused.wanted() and not model.is_part:
        return _decode_fused(model, token, cache)
    x, cache = _extend(model, token[:, None], jnp.ones((token.shape[0], 1), bool), cache)
    return logits(model, x[:, 0]), cache


@functools.partial(jax.jit, static_argnums=0)
def _spread(step: Callable[..., Any], model: CausalLM, *args: Any) -> tuple[Float[Array, "b vocab"], Cache]:
    """A step of a model whose weights lie on several devices; the last argument is the cache."""
    return on_every_device(model, step, *args, like=(0, args[-1].replace(empty=False)))


def _decode_fused(model: CausalLM, token: Int[Array, " b"], cache: Cache) -> tuple[Float[Array, "b vocab"], Cache]:
    """`decode`, block after block by the kernels of `layers.fused` where these can, by the block's own functions where
    not. These kernels keep the stream in bfloat16, whatever `residual_fp32` says.
    """
    config, params, positions = model.config, model.params, cache.position
    valid = jnp.ones((token.shape[0], 1), bool)
    filled = jax.lax.dynamic_update_slice(cache.valid, valid, (0, cache.slot))
    context = Context(positions[:, None], filled[:, None, :], valid, cache.slot)
    step = fused.first_step(positions, filled, cache.slot, config)
    places = [(i, kind) for i, kinds in enumerate(config.pattern) for kind in kinds]
    norms = [params["layers"][i][kind]["norm"] for i, kind in places] + [params["norm"]]
    stream = fused.Stream(embed(params, token[:, None], model.dtype)[:, 0])
    after: list[dict[str, Any]] = [{} for _ in config.pattern]
    coming = fused.coming(params, places, params.get("head", params["embed"]))
    for (i, kind), norm in zip(places, norms[1:], strict=True):
        step = step._replace(coming=coming[i, kind])
        leaves, state = params["layers"][i][kind], cache.layers[i][kind]
        try:
            stream, after[i][kind], step = fused.KINDS[kind](config, leaves, stream, norm, step, state)
        except NotImplementedError:
            block, x = KINDS[kind], stream.x[:, None]
            normed = block.read(config, leaves, x)
            hidden, after[i][kind] = block.cached_inner(config, leaves, normed, context, state)
            stream = fused.Stream((x + block.write(leaves, hidden))[:, 0])
    cache = Cache(layers=tuple(after), valid=filled, position=positions + 1, slot=cache.slot + 1)
    try:
        if "head_in" in params:
            turned = fused.Stream(head_input(params, rms_norm(stream.x, params["norm"], config.norm_eps)))
            out = fused.head(config, params["embed"], None, turned)
        else:
            out = fused.head(config, params.get("head", params["embed"]), params["norm"], stream)
    except NotImplementedError:
        return logits(model, stream.x), cache
    return out.astype(jnp.float32), cache
