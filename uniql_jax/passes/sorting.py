"""First pass, layer by layer: gather statistics on calibration windows, then bring every elastic axis into order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax import elastic
from uniql_jax.config import ModelConfig
from uniql_jax.layers import KINDS, attention
from uniql_jax.layers.context import Context, full_context
from uniql_jax.layers.norm import rms_norm
from uniql_jax.model import apply_layer
from uniql_jax.passes.options import Options
from uniql_jax.sort.mlp import order_channels
from uniql_jax.sort.order import tail_loss
from uniql_jax.sort.rope_pairs import order_pairs
from uniql_jax.sort.value_output import rank_loss, sort_value_output

Statistics = dict[str, Array]
Sorted = tuple[dict[str, Any], dict[str, Array]]
Block = Mapping[str, Any]


def gram(x: Float[Array, "..."], width: int) -> Float[Array, "w w"]:
    """Sum of outer products of the rows of x seen as [rows, width], float32."""
    rows = x.astype(jnp.float32).reshape(-1, width)
    return rows.T @ rows


def _attention_taps(
    config: ModelConfig, leaves: Block, normed: Array, context: Context, tap: Array
) -> tuple[Array, Any]:
    q, k, v = attention.project(config, leaves, normed, context)
    q = q + tap
    hidden = attention.attend(config, q, k, v, context.visible)
    return hidden, (q, k)


def _attention_statistics(config: ModelConfig, normed: Array, hidden: Array, seen: Any, slope: Array) -> Statistics:
    q, k = seen
    shape = (*q.shape[:2], config.kv_heads, config.query_groups)
    grouped = q.reshape(*shape, -1)
    centred = k - jnp.mean(k, axis=1, keepdims=True)
    received = hidden.reshape(*hidden.shape[:3], *shape[2:])
    felt = (q * slope).reshape(*shape, -1, 2).sum((3, 5))  # [b, t, g, pairs]
    return {
        "gram_x": gram(normed, config.hidden_size),
        "gram_q": jnp.einsum("btgmi,btgmj->gmij", grouped, grouped),
        "gram_k": jnp.einsum("btgi,btgj->gij", centred, centred),
        "gram_out": jnp.einsum("btigm,btjgm->gij", received, received),
        "gate_fisher": jnp.einsum("btgi,btgj->gij", felt, felt),
    }


def _sort_attention(config: ModelConfig, leaves: Block, stats: Statistics, options: Options, seed: int) -> Sorted:
    order = order_pairs(stats["gram_q"], stats["gram_k"], options.pair_score, seed, stats["gate_fisher"])  # [pairs, g]
    by_head = jnp.repeat(order, config.query_groups, axis=1)
    out = dict(leaves)
    for name, leaf in elastic.leaves(config, "attention").items():
        if leaf.axis == "qk":
            index = by_head if "head" in leaf.dims else order
            place = leaf.dims.index("head" if "head" in leaf.dims else "kv_head")
            shape = [1] * len(leaf.dims)
            shape[0], shape[place] = index.shape
            out[name] = jnp.take_along_axis(leaves[name], index.reshape(shape), axis=0)
    metric = stats["fisher"] if options.output_metric else None
    change, out["v"], out["o"] = sort_value_output(
        leaves["v"], leaves["o"], stats["gram_out"], stats["gram_x"], options.value_output, seed, metric
    )
    ordered = jax.vmap(lambda loss, index: loss[index][:, index])(stats["gate_fisher"], order.T)
    losses = {"qk": tail_loss(ordered).sum(0), "vo": rank_loss(change, out["o"], stats["gram_out"], stats["fisher"])}
    return out, losses


def _mlp_taps(config: ModelConfig, leaves: Block, normed: Array, context: Context, tap: Array) -> tuple[Array, Any]:
    return KINDS["mlp"].inner(config, leaves, normed, context) + tap, ()


def _mlp_statistics(config: ModelConfig, normed: Array, hidden: Array, seen: Any, slope: Array) -> Statistics:
    width = hidden.shape[-1]
    return {"gram": gram(hidden, width), "gate_fisher": gram(hidden * slope, width)}


def _sort_mlp(config: ModelConfig, leaves: Block, stats: Statistics, options: Options, seed: int) -> Sorted:
    metric = stats["fisher"] if options.output_metric else None
    order = order_channels(stats["gram"], leaves["down"], options.mlp_score, seed, metric, stats["gate_fisher"])
    out = {name: value[order] if elastic.BLOCKS["mlp"][name].axis == "ffn" else value for name, value in leaves.items()}
    loss = stats["gram"] * (leaves["down"] @ stats["fisher"] @ leaves["down"].T)
    return out, {"ffn": tail_loss(loss[order][:, order])}


class Sorter(NamedTuple):
    """How one kind of block is measured and sorted.

    A tap is an array of zeros added where entries of an elastic axis act: its gradient says what the loss feels there.
    `tap` gives its shape, `run` is the block's inner function with it, `statistics` sums over a batch, `sort` takes
    their mean.
    """

    tap: Callable[[ModelConfig], tuple[int, ...]]
    run: Callable[..., Any]
    statistics: Callable[..., Statistics]
    sort: Callable[..., Sorted]


SORTERS: dict[str, Sorter] = {
    "attention": Sorter(lambda c: (c.heads, c.head_dim), _attention_taps, _attention_statistics, _sort_attention),
    "mlp": Sorter(lambda c: (c.intermediate_size,), _mlp_taps, _mlp_statistics, _sort_mlp),
}
"""Block kind -> its sorter; the keys are those of `elastic.BLOCKS`."""


@functools.partial(jax.jit, static_argnames=("config", "kinds"))
def layer_forward(
    config: ModelConfig, kinds: tuple[str, ...], layer: Mapping[str, Block], x: Float[Array, "b t h"]
) -> tuple[Float[Array, "b t h"], Float[Array, ""]]:
    """One batch of windows through a layer: its output, and the sum over tokens of the cosine between the layer's
    input and output (block influence is one minus its mean).
    """
    y = apply_layer(config, kinds, layer, x, full_context(jnp.ones(x.shape[:2], bool)))
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return y, jnp.sum(jnp.sum(x * y, axis=-1) / jnp.maximum(norms, 1e-30))


@functools.partial(jax.jit, static_argnames=("config", "kinds"))
def layer_statistics(
    config: ModelConfig,
    kinds: tuple[str, ...],
    layer: Mapping[str, Block],
    x: Float[Array, "b t h"],
    gradient: Float[Array, "b t h"],
) -> tuple[Float[Array, "b t h"], dict[str, Statistics]]:
    """One batch back through a layer: gradient of the loss at its input from the one at its output, and the summed
    statistics of every block.
    """
    context = full_context(jnp.ones(x.shape[:2], bool))
    pulls, outputs = [], x
    for kind in kinds:
        leaves = layer[kind]

        def run(x: Array, tap: Array, kind: str = kind, leaves: Block = leaves) -> tuple[Array, Any]:
            normed = KINDS[kind].read(config, leaves, x)
            hidden, seen = SORTERS[kind].run(config, leaves, normed, context, tap)
            return x + KINDS[kind].write(leaves, hidden), (normed, hidden, seen)

        tap = jnp.zeros((*x.shape[:2], *SORTERS[kind].tap(config)), x.dtype)
        outputs, pull, found = jax.vjp(run, outputs, tap, has_aux=True)
        pulls.append((kind, pull, found))
    stats: dict[str, Statistics] = {}
    for kind, pull, (normed, hidden, seen) in reversed(pulls):
        fisher = gram(gradient, gradient.shape[-1])
        gradient, slope = pull(gradient)
        stats[kind] = SORTERS[kind].statistics(config, normed, hidden, seen, slope) | {"fisher": fisher}
    return gradient, stats


def sort_layer(
    config: ModelConfig,
    kinds: tuple[str, ...],
    layer: Mapping[str, Block],
    stats: Mapping[str, Statistics],
    options: Options,
    seed: Int[Array, ""] | int = 0,
) -> tuple[dict[str, Block], dict[str, Float[Array, "_"]]]:
    """The layer with every elastic axis sorted, most important first, and per axis the estimated loss of keeping
    0 ... all of its entries; `stats` are means over tokens.

    Not for `jax.jit`: see `value_output.decompose` on factorizations.
    """
    done, losses = {}, {}
    for kind in kinds:
        done[kind], found = SORTERS[kind].sort(config, layer[kind], stats[kind], options, seed)
        losses |= found
    return done, losses


@functools.partial(jax.jit, static_argnames=("eps",))
def loss_gradient(
    top: Mapping[str, Array], x: Float[Array, "b t h"], tokens: Int[Array, "b t"], eps: float
) -> Float[Array, "b t h"]:
    """Gradient of the summed next-token loss at the last layer's output, window by window, as logits are large."""

    def loss(x: Array, tokens: Array) -> Array:
        normed = rms_norm(x[:-1], top["norm"], eps)
        log_probs = jax.nn.log_softmax(normed @ top.get("head", top["embed"]).T)
        return -jnp.take_along_axis(log_probs, tokens[1:, None], axis=1).sum()

    return jax.lax.map(lambda pair: jax.grad(loss)(*pair), (x, tokens))


@functools.partial(jax.jit, static_argnames=("eps",))
def final_gram(x: Float[Array, "b t h"], eps: float) -> Float[Array, "h h"]:
    """Summed Gram matrix of the final norm's output before its weight: what the head will read."""
    unit = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return gram(unit, x.shape[-1])
