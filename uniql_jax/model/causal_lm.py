"""CausalLM: embedding, layers by pattern, head; the forward pass at any prune rate. No family is named here."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from uniql_jax import elastic
from uniql_jax.config import ModelConfig
from uniql_jax.errors import UserError
from uniql_jax.model.layers import KINDS
from uniql_jax.model.layers.context import Context, full_context
from uniql_jax.model.layers.linear import apply_rows
from uniql_jax.model.layers.norm import rms_norm
from uniql_jax.model.parallel import local_keep, on_every_device, split_of_params
from uniql_jax.plan import Plan
from uniql_jax.weights.protocol import as_weight
from uniql_jax.weights.shard import VocabularyPart
from uniql_jax.weights.split import Split

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

    @property
    def split(self) -> Split | None:
        """How the weights are shared out among several devices; None: they lie on one."""
        return split_of_params(self.params)

    @property
    def is_part(self) -> bool:
        """Whether this is what one of several devices computes with."""
        return isinstance(self.params.get("embed"), VocabularyPart)

    def part(self, params: dict[str, Any]) -> CausalLM:
        """The model as one of several devices computes with it: its own leaves, at the sizes of a part."""
        assert self.split is not None
        return CausalLM(self.split.part_config(), params, dtype=self.dtype)

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
    if model.split is not None:
        return _spread_hidden_states(model, tokens, attention_mask, keep, remat)
    valid = jnp.ones(tokens.shape, bool) if attention_mask is None else attention_mask.astype(bool)
    context = full_context(valid, padded=attention_mask is not None)
    x = embed_stream(model, tokens)
    apply = functools.partial(apply_layer, dtype=model.dtype)
    if remat:
        apply = jax.checkpoint(apply, static_argnums=(0, 1))
    for i, (kinds, layer) in enumerate(zip(model.config.pattern, model.params["layers"], strict=True)):
        x = apply(model.config, kinds, layer, x, context._replace(keep=keep[i] if keep else None))
    return x


@functools.partial(jax.jit, static_argnames="remat")
def _spread_hidden_states(
    model: CausalLM,
    tokens: Int[Array, "b t"],
    attention_mask: Int[Array, "b t"] | None,
    keep: tuple[elastic.Keep, ...] | None,
    remat: bool,
) -> Float[Array, "b t h"]:
    split = model.split
    assert split is not None

    def local(part: CausalLM, tokens: Array, attention_mask: Array | None, keep: Any) -> Array:
        return hidden_states(part, tokens, attention_mask, local_keep(split, keep), remat)

    return on_every_device(model, local, tokens, attention_mask, keep)


def logits(model: CausalLM, x: Float[Array, "*b h"]) -> Float[Array, "*b vocab"]:
    """Final norm and head, float32."""
    if model.split is not None:
        return _spread_logits(model, x)
    params = model.params
    x = rms_norm(x, params["norm"], model.config.norm_eps).astype(model.dtype)
    return apply_rows(head_input(params, x), params.get("head", params["embed"])).astype(jnp.float32)


@jax.jit
def _spread_logits(model: CausalLM, x: Float[Array, "*b h"]) -> Float[Array, "*b vocab"]:
    return on_every_device(model, logits, x)


def head_input(params: Mapping[str, Any], normed: Float[Array, "*b h"]) -> Float[Array, "*b h"]:
    """What the head receives: the normed stream, turned by `head_in` where one rotated table serves twice."""
    if "head_in" not in params:
        return normed
    mixed = jnp.matmul(normed, params["head_in"].astype(normed.dtype), preferred_element_type=jnp.float32)
    return mixed.astype(normed.dtype)


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
