"""CausalLM: embedding, layers by pattern, head; full forward, prefill and decode. No family is named here."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from uniql_jax import elastic
from uniql_jax.config import ModelConfig
from uniql_jax.errors import UserError
from uniql_jax.model.cache import Cache
from uniql_jax.model.layers import KINDS, fused
from uniql_jax.model.layers.context import Causal, Context, full_context
from uniql_jax.model.layers.linear import apply_rows
from uniql_jax.model.layers.norm import rms_norm
from uniql_jax.plan import Plan
from uniql_jax.weights.protocol import as_weight

Layer = Mapping[str, Mapping[str, Any]]


class CausalLM(nnx.Module):
    """A causal language model at fixed kept sizes.

    `params` is {"layers": [{kind: {leaf: value}}], "embed", "norm", ["head_in", "head"]} with the leaves of
    `elastic.BLOCKS`, dense or packed; `plan` leads to smaller sizes (None when unsorted); `rate` is the prune rate it
    has now; `folder` is where it came from; activations are computed in `dtype`.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: dict[str, Any],
        plan: Plan | None = None,
        rate: float = 0.0,
        folder: str | None = None,
        dtype: Any = jnp.float32,
    ):
        self.config = config
        self.plan = plan
        self.rate = rate
        self.folder = folder
        self.dtype = jnp.dtype(dtype)
        self.params = nnx.data(params)

    @property
    def keep(self) -> tuple[dict[str, int], ...]:
        """Kept size of every elastic axis, a dict per layer, read off the leaves themselves."""
        return tuple(kept_sizes(layer) for layer in self.params["layers"])

    def __call__(
        self, tokens: Int[Array, "b t"], attention_mask: Int[Array, "b t"] | None = None
    ) -> Float[Array, "b t vocab"]:
        """Logits in float32 of every position; `attention_mask` is 1 on tokens and 0 on padding."""
        return logits(self, hidden_states(self, tokens, attention_mask))


def kept_sizes(layer: Layer) -> dict[str, int]:
    """Kept size of each elastic axis of a layer, from the shapes of its leaves."""
    return {
        elastic.BLOCKS[kind][name].dims[0]: value.shape[0]
        for kind, block in layer.items()
        for name, value in block.items()
        if elastic.BLOCKS[kind][name].axis
    }


def embed(params: Mapping[str, Any], tokens: Int[Array, "b t"], dtype: Any) -> Float[Array, "b t h"]:
    """Rows of the embedding, dense or packed."""
    return as_weight(params["embed"]).lookup(tokens, dtype)


def embed_stream(model: CausalLM, tokens: Int[Array, "b t"]) -> Float[Array, "b t h"]:
    """The residual stream before the first layer: float32 where the model was trained so, else in the model's dtype."""
    return embed(model.params, tokens, model.dtype).astype(jnp.float32 if model.config.residual_fp32 else model.dtype)


def apply_layer(
    config: ModelConfig,
    kinds: tuple[str, ...],
    layer: Layer,
    x: Float[Array, "b t h"],
    context: Context,
    dtype: Any = None,
) -> Float[Array, "b t h"]:
    """One layer, block after block, over whole sequences; blocks compute in `dtype` (None: that of the stream)."""
    for kind in kinds:
        block, leaves = KINDS[kind], layer[kind]
        normed = block.read(config, leaves, x).astype(dtype or x.dtype)
        x = x + block.write(leaves, block.inner(config, leaves, normed, context))
    return x


def hidden_states(
    model: CausalLM,
    tokens: Int[Array, "b t"],
    attention_mask: Int[Array, "b t"] | None = None,
    keep: tuple[elastic.Keep, ...] | None = None,
    remat: bool = False,
) -> Float[Array, "b t h"]:
    """The residual stream after the last layer (before the final norm).

    Args:
        model: the model.
        tokens: int32 token ids.
        attention_mask: 1 on tokens and 0 on padding; None where nothing is padded.
        keep: one mapping a layer, masks the elastic axes: same result as a slice, but sizes may be traced.
        remat: a gradient stores only what passes between layers and computes the rest again, for less memory.

    Returns:
        The stream, float32 where the config says `residual_fp32`, else in the model's dtype.
    """
    valid = jnp.ones(tokens.shape, bool) if attention_mask is None else attention_mask.astype(bool)
    context = full_context(valid, padded=attention_mask is not None)
    x = embed_stream(model, tokens)
    apply = functools.partial(apply_layer, dtype=model.dtype)
    if remat:
        apply = jax.checkpoint(apply, static_argnums=(0, 1))
    for i, (kinds, layer) in enumerate(zip(model.config.pattern, model.params["layers"], strict=True)):
        x = apply(model.config, kinds, layer, x, context._replace(keep=keep[i] if keep else None))
    return x


def logits(model: CausalLM, x: Float[Array, "*b h"]) -> Float[Array, "*b vocab"]:
    """Final norm and head, float32."""
    params = model.params
    x = rms_norm(x, params["norm"], model.config.norm_eps).astype(model.dtype)
    return apply_rows(head_input(params, x), params.get("head", params["embed"])).astype(jnp.float32)


def head_input(params: Mapping[str, Any], normed: Float[Array, "*b h"]) -> Float[Array, "*b h"]:
    """What the head receives: the normed stream, turned by `head_in` where one rotated table serves twice."""
    if "head_in" not in params:
        return normed
    mixed = jnp.matmul(normed, params["head_in"].astype(normed.dtype), preferred_element_type=jnp.float32)
    return mixed.astype(normed.dtype)


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
    return Cache(
        layers=tuple(
            {kind: KINDS[kind].init_state(model.config, kept, batch, length, model.dtype) for kind in kinds}
            for kinds, kept in zip(model.config.pattern, model.keep, strict=True)
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

    def states() -> list[Array]:
        found = [
            KINDS[kind].init_state(config, kept, batch, length, dtype)
            for kinds, kept in zip(config.pattern, keep, strict=True)
            for kind in kinds
        ]
        return jax.tree.leaves(found)

    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.eval_shape(states))


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
    if fused.wanted():
        return _decode_fused(model, token, cache)
    x, cache = _extend(model, token[:, None], jnp.ones((token.shape[0], 1), bool), cache)
    return logits(model, x[:, 0]), cache


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


def require_plan(plan: Plan | None) -> Plan:
    """The plan, or a clear refusal."""
    if plan is None:
        raise UserError("this checkpoint was never sorted, so it has no prune rates; run python -m uniql_jax.compress")
    return plan


def prune(model: CausalLM, prune_rate: float) -> CausalLM:
    """The same model at a higher prune rate: a prefix of every leaf, nothing computed anew.

    Args:
        model: a sorted model.
        prune_rate: fraction of the prunable parameters to leave out, from 0 to 0.35.

    Returns:
        A model of the smaller leaves; `model` is unchanged.

    Raises:
        UserError: the model was never sorted, or the rate is below the one it already has.
    """
    keep = require_plan(model.plan).keep_from(model.rate, prune_rate)
    params = dict(model.params)
    params["layers"] = [elastic.slice_layer(layer, kept) for layer, kept in zip(params["layers"], keep, strict=True)]
    return CausalLM(model.config, params, model.plan, prune_rate, model.folder, model.dtype)


def forward(
    model: CausalLM,
    tokens: Int[Array, "b t"],
    prune_rate: float = 0.0,
    attention_mask: Int[Array, "b t"] | None = None,
) -> Float[Array, "b t vocab"]:
    """Logits at any prune rate from one resident model.

    Args:
        model: a sorted model, at `prune_rate` or below.
        tokens: int32 token ids.
        prune_rate: fraction of the prunable parameters to leave out, from 0 to 0.35; static under `jax.jit`.
        attention_mask: 1 on tokens and 0 on padding; None where nothing is padded.

    Returns:
        Logits of every position, float32.

    Raises:
        UserError: as `prune` does.
    """
    small = prune(model, prune_rate) if prune_rate != model.rate else model
    return small(tokens, attention_mask)
