"""MoDeGPT (Lin et al., arXiv 2408.09632): pairs of matrices are cut together, each kind by a decomposition of its own.

I, MLP, Nystroem: the channels of the highest ridge leverage [C (C + l I)^-1]_jj stay, C = E[a a^T] of down's input, and
down is fitted to them, (S^T C S)^+ S^T C W_down. II, Q and K, CR: RoPE pairs of the highest |C_Q^1/2 e_i| |C_K^1/2 e_i|
stay, summed over both features of a pair and over the query heads of a group. III, V and O: SVD of C_x^1/2 W_V W_O cut
to rank r. Layers lose different parts: softmax(-BI_l / 0.1) of block influence, at most 0.85 (the package's plan of
that name, which also rounds sizes to its units). Every statistic is the original model's. The ridge l is the mean of
C's diagonal, not the paper's 1, which no float32 sum of activations would feel.

Evaluated: zeros in place of what is cut, so that one program serves all rates. Counted: what is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from benchmarks import published_sorting
from benchmarks.baselines import sizes
from benchmarks.baselines.dense import Block, Calibration, Dense, Layer, Made
from benchmarks.baselines.gptq import four_bits
from uniql_jax import elastic
from uniql_jax.compression.math.rope_pairs import order_pairs
from uniql_jax.config import ModelConfig
from uniql_jax.plan import make_plan


def _cut(value: Array, keep: int) -> Array:
    """Zeros from entry `keep` of the first dimension on."""
    return value.at[keep:].set(0.0)


def cut_mlp(block: Block, gram: Array, keep: int) -> dict[str, Array]:
    """An MLP of so many channels, the most important first."""
    if keep == len(gram):
        return dict(block)
    chosen, down = published_sorting.nystroem_mlp(gram, block["down"], keep, hermitian=True)
    out = dict(block)
    for name in ("gate", "up", "gate_bias", "up_bias"):
        if name in block:
            out[name] = jnp.zeros_like(block[name]).at[:keep].set(block[name][chosen])
    out["down"] = jnp.zeros_like(block["down"]).at[:keep].set(down)
    return out


def cut_attention(config: ModelConfig, block: Block, stats: Mapping[str, Any], pairs: int, ranks: int) -> Block:
    """Attention of so many RoPE pairs and V/O ranks."""
    out, full = dict(block), elastic.sizes(config)
    if pairs < full["qk"]:
        order = order_pairs(stats["q"], stats["k"], "published", width=full["pair"])
        by_head = {"head": jnp.repeat(order, config.query_groups, axis=1), "kv_head": order}
        out = elastic.reorder(config, "attention", out, "qk", by_head)
        out |= {name: _cut(out[name], pairs) for name in ("q", "k", "q_bias", "k_bias") if name in out}
    if ranks < full["vo"]:
        value = block["v"].transpose(1, 0, 2)
        output = block["o"].transpose(1, 0, 2).reshape(config.kv_heads, config.query_groups, full["vo"], -1)
        value, output = published_sorting.svd_value_output(stats["read"], value, output, ranks)
        output = output.reshape(config.heads, ranks, -1).transpose(1, 0, 2)
        out["v"] = jnp.zeros_like(block["v"]).at[:ranks].set(value.transpose(1, 0, 2))
        out["o"] = jnp.zeros_like(block["o"]).at[:ranks].set(output)
    return out


def cut_layer(config: ModelConfig, layer: Layer, stats: Mapping[str, Any], keep: sizes.Keep) -> Layer:
    """A layer at these kept sizes."""
    of_attention = {name: jnp.asarray(value) for name, value in stats["attention"].items()}
    return {
        "attention": cut_attention(config, layer["attention"], of_attention, keep["qk"], keep["vo"]),
        "mlp": cut_mlp(layer["mlp"], jnp.asarray(stats["mlp"]["hidden"]), keep["ffn"]),
    }


def cut_model(calibration: Calibration, keeps: Sequence[sizes.Keep]) -> Dense:
    """The model at these kept sizes, one mapping a layer."""
    model = calibration.model
    each = zip(model.layers, calibration.stats, keeps, strict=True)
    return model._replace(layers=[cut_layer(model.config, layer, stats, keep) for layer, stats, keep in each])


def rows(calibration: Calibration, rates: Sequence[float]) -> Iterator[Made]:
    """The model at every rate."""
    config = calibration.model.config
    plan = make_plan(config, calibration.influence)
    for rate in rates:
        keeps = plan.keep(rate)
        parameters = sizes.kept_parameters(config, keeps)
        share = sizes.removed(config, sizes.matrices_left(config, keeps))
        made = Made(rate, share, parameters, 2 * parameters, cut_model(calibration, keeps), keeps=keeps, plan=plan)
        yield four_bits(made, calibration, keeps)
