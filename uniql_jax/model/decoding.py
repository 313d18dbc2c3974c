"""Decoding with a cache: prompts are read once, then one token at a time. No family is named here."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.config import ModelConfig
from uniql_jax.model.cache import Cache
from uniql_jax.model.causal_lm import CausalLM, embed, embed_stream, head_input, logits
from uniql_jax.model.layers import KINDS, fused
from uniql_jax.model.layers.context import Cached, Causal, Context
from uniql_jax.model.layers.norm import rms_norm
from uniql_jax.model.parallel import on_every_device, placed
from uniql_jax.pallas_kernels import dispatch
from uniql_jax.pallas_kernels.attention.decode import Place


def init_cache(model: CausalLM, batch: int, length: int, bits: int = 16) -> Cache:
    """An empty cache, sized for what this model keeps at its prune rate.

    Args:
        model: the model that will fill it.
        batch: sequences.
        length: tokens per sequence, prompt and new ones together.
        bits: 8 holds keys and values as int8, with a scale per head and token; 16 in the model's dtype.

    Returns:
        Keys, values and states of every layer, `start` (None: every sequence begins at slot 0) and `slot` int32.
    """
    if model.split is None:
        return empty_cache(model.config, model.keep, batch, length, model.dtype, bits)
    return placed(empty_cache(model.split.whole_config(), model.keep, batch, length, model.dtype, bits), model.split)


def empty_cache(
    config: ModelConfig, keep: Sequence[Mapping[str, int]], batch: int, length: int, dtype: Any, bits: int = 16
) -> Cache:
    """`init_cache` from the kept sizes of every layer."""
    return Cache(
        layers=tuple(
            {kind: KINDS[kind].init_state(config, kept, batch, length, dtype, bits) for kind in kinds}
            for kinds, kept in zip(config.pattern, keep, strict=True)
        ),
        start=None,
        slot=jnp.zeros((), jnp.int32),
        empty=True,
    )


def cache_bytes(
    config: ModelConfig,
    keep: Sequence[Mapping[str, int]],
    batch: int,
    length: int,
    dtype: Any = jnp.bfloat16,
    bits: int = 16,
) -> int:
    """Bytes that decoding remembers at these kept sizes: keys and values, convolution inputs, SSM states."""
    found = jax.eval_shape(lambda: empty_cache(config, keep, batch, length, dtype, bits).layers)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(found))


def _context(length: int, batch: int, cache: Cache, count: Int[Array, ""] | int | None) -> Context:
    """Of `length` new tokens from the cache's slot on, the first `count` of which are tokens."""
    place = (cache.slot + jnp.arange(length))[None]
    positions, valid = place, jnp.ones((1, 1), bool)
    if cache.start is not None:
        positions, valid = jnp.maximum(place - cache.start[:, None], 0), place >= cache.start[:, None]
    if count is not None:
        valid = valid & (jnp.arange(length) < count)[None]
    valid, positions = (jnp.broadcast_to(x, (batch, length)) for x in (valid, positions))
    # Padding that follows the tokens is seen by none of them.
    visible = Causal(None if cache.start is None else valid) if cache.empty else Cached(cache.start)
    return Context(positions, visible, valid, cache.slot, count=count)


def _extend(
    model: CausalLM, tokens: Int[Array, "b t"], cache: Cache, count: Int[Array, ""] | int | None = None
) -> tuple[Float[Array, "b t h"], Cache]:
    """Run tokens through all layers, reading and extending the cache."""
    context = _context(tokens.shape[1], tokens.shape[0], cache, count)
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
    slot = cache.slot + (tokens.shape[1] if count is None else count)
    return x, Cache(layers=tuple(layers), start=cache.start, slot=slot)


def prefill(
    model: CausalLM,
    tokens: Int[Array, "b t"],
    attention_mask: Int[Array, "b t"] | None,
    cache: Cache,
    count: Int[Array, ""] | int | None = None,
) -> tuple[Float[Array, "b vocab"], Cache]:
    """Read prompts into the cache, or a part of them where the cache holds what precedes it.

    Args:
        model: the model, at any prune rate.
        tokens: int32 token ids, padded on the left where the prompts differ in length.
        attention_mask: 1 on tokens and 0 on padding on the left, which only padding may precede in the cache; None
            where nothing is padded.
        cache: as `init_cache` or an earlier `prefill` returns it, with room for all of `tokens`.
        count: how many of the columns hold tokens; those behind them are padding that later tokens overwrite, and may
            hold anything. None: all of them.

    Returns:
        The logits after the last token, float32, and the cache with the prompts in it.
    """
    if attention_mask is not None:
        padding = (attention_mask == 0).sum(axis=1, dtype=jnp.int32)
        start = padding if cache.start is None else cache.start + padding
        cache = dataclasses.replace(cache, start=start)
    count = None if count is None else jnp.asarray(count, jnp.int32)
    if model.split is not None:
        return _spread(_read, model, tokens, count, cache)
    return _read(model, tokens, count, cache)


def _read(
    model: CausalLM, tokens: Int[Array, "b t"], count: Int[Array, ""] | None, cache: Cache
) -> tuple[Float[Array, "b vocab"], Cache]:
    """`prefill` on one device."""
    x, cache = _extend(model, tokens, cache, count)
    last = x[:, -1] if count is None else jax.lax.dynamic_index_in_dim(x, count - 1, 1, keepdims=False)
    return logits(model, last), cache


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
    if not model.is_part:
        if any(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in jax.tree.leaves(model.params)):
            dispatch.note(jax.default_backend())
        if fused.wanted():
            return _decode_fused(model, token, cache)
    x, cache = _extend(model, token[:, None], cache)
    return logits(model, x[:, 0]), cache


@functools.partial(jax.jit, static_argnums=0)
def _spread(step: Callable[..., Any], model: CausalLM, *args: Any) -> tuple[Float[Array, "b vocab"], Cache]:
    """A step of a model whose weights lie on several devices; the last argument is the cache."""
    return on_every_device(model, step, *args, like=(0, args[-1].replace(empty=False)))


def _decode_fused(model: CausalLM, token: Int[Array, " b"], cache: Cache) -> tuple[Float[Array, "b vocab"], Cache]:
    """`decode`, block after block by the kernels of `layers.fused` where these can, by the block's own functions where
    not. These kernels keep the stream in bfloat16, whatever `residual_fp32` says.
    """
    config, params, batch = model.config, model.params, token.shape[0]
    context = _context(1, batch, cache, None)
    step = fused.first_step(batch, Place(cache.start, cache.slot), config)
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
        except NotImplementedError as refusal:
            dispatch.refuse(f"decode of {kind} blocks", "pallas", str(refusal))
            block, x = KINDS[kind], stream.x[:, None]
            normed = block.read(config, leaves, x)
            hidden, after[i][kind] = block.cached_inner(config, leaves, normed, context, state)
            stream = fused.Stream((x + block.write(leaves, hidden))[:, 0])
    cache = Cache(layers=tuple(after), start=cache.start, slot=cache.slot + 1)
    try:
        if "head_in" in params:
            turned = fused.Stream(head_input(params, rms_norm(stream.x, params["norm"], config.norm_eps)))
            out = fused.head(config, params["embed"], None, turned)
        else:
            out = fused.head(config, params.get("head", params["embed"]), params["norm"], stream)
    except NotImplementedError as refusal:
        dispatch.refuse("decode of the head", "pallas", str(refusal))
        return logits(model, stream.x), cache
    return out.astype(jnp.float32), cache
