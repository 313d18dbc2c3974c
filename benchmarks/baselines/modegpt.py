"""MoDeGPT (Lin et al., arXiv 2408.09632): pairs of matrices are cut together, each kind by a decomposition of its own.

I, MLP, Nystroem: the channels of the highest ridge leverage [C (C + l I)^-1]_jj stay, C = E[a a^T] of down's input, and
down is fitted to them, (S^T C S)^-1 S^T C W_down. II, Q and K, CR: RoPE pairs of the highest |C_Q^1/2 e_i| |C_K^1/2
e_i| stay, summed over both features of a pair and over the query heads of a group. III, V and O: SVD of C_x^1/2 W_V W_O
cut to rank r, the O of a group's query heads side by side. Layers lose different parts: softmax(-BI_l / 0.1) of block
influence, at most 0.85 (the package's plan of that name, which also rounds sizes to its units). Every statistic is the
original model's.

Two things differ in the arithmetic alone. The ridge l is the mean of C's diagonal, where the paper has 1, so that it
does not depend on the scale of activations. Solves are in float64, with C scaled to a unit diagonal: single channels
are so large that float32 loses the others.

Evaluated: zeros in place of what is cut, so that one program serves all rates. Counted: what is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float, Int

from benchmarks import published_sorting
from benchmarks.baselines import sizes
from benchmarks.baselines.dense import Block, Calibration, Dense, Layer, Made
from benchmarks.baselines.gptq import four_bits
from uniql_jax import elastic
from uniql_jax.compression.math.rope_pairs import order_pairs
from uniql_jax.compression.math.value_output import sort_value_output
from uniql_jax.config import ModelConfig
from uniql_jax.plan import make_plan

RIDGE = 1e-7
"""Of the unit diagonal: what a Gram matrix summed in float32 resolves."""


def _filled(kept: Array, count: int) -> Array:
    """Zeros after the entries that are kept, `count` in all."""
    return jnp.pad(kept, [(0, count - len(kept))] + [(0, 0)] * (kept.ndim - 1))


def fitted(
    gram: Float[np.ndarray, "f f"], down: Float[np.ndarray, "f h"], chosen: Int[np.ndarray, " k"]
) -> Float[np.ndarray, "k h"]:
    """The output matrix of these channels alone that comes nearest to the whole one's output; float64 on the host."""
    wide = gram.astype(np.float64)
    size = np.sqrt(np.maximum(np.diagonal(wide), np.finfo(np.float32).tiny))
    inner = wide[np.ix_(chosen, chosen)] / size[chosen] / size[chosen, None]
    inner += RIDGE * np.eye(len(chosen))
    wanted = (wide[chosen] @ down.astype(np.float64)) / size[chosen, None]
    return scipy.linalg.cho_solve(scipy.linalg.cho_factor(inner), wanted) / size[chosen, None]


def cut_mlp(block: Block, gram: Array, keep: int) -> dict[str, Array]:
    """An MLP of so many channels, the most important first."""
    if keep == len(gram):
        return dict(block)
    chosen = np.argsort(-np.asarray(published_sorting.leverage(gram)), kind="stable")[:keep]
    down = jnp.asarray(fitted(np.asarray(gram), np.asarray(block["down"]), chosen), jnp.float32)
    out = dict(block)
    for name in ("gate", "up", "gate_bias", "up_bias"):
        if name in block:
            out[name] = _filled(block[name][chosen], len(gram))
    out["down"] = _filled(down, len(gram))
    return out


def cut_attention(config: ModelConfig, block: Block, stats: Mapping[str, Any], pairs: int, ranks: int) -> Block:
    """Attention of so many RoPE pairs and V/O ranks."""
    out, full = dict(block), elastic.sizes(config)
    if pairs < full["qk"]:
        order = order_pairs(stats["q"], stats["k"], "published", width=full["pair"])
        by_head = {"head": jnp.repeat(order, config.query_groups, axis=1), "kv_head": order}
        out = elastic.reorder(config, "attention", out, "qk", by_head)
        out |= {name: _filled(out[name][:pairs], full["qk"]) for name in ("q", "k", "q_bias", "k_bias") if name in out}
    if ranks < full["vo"]:
        _, value, output = sort_value_output(
            block["v"], block["o"], jnp.zeros((config.kv_heads, full["vo"], full["vo"])), stats["read"], "joint"
        )
        out |= {"v": _filled(value[:ranks], full["vo"]), "o": _filled(output[:ranks], full["vo"])}
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
