"""Measuring and sorting Mamba2 blocks: channels of the SSM heads, states."""

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
from uniql_jax.compression.math.ssm import order_head_channels, order_states
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.compression.sorters.base import Block, Seed, Sorted, Sorter, Statistics, Taps
from uniql_jax.config import ModelConfig
from uniql_jax.model.layers import mamba2
from uniql_jax.model.layers.context import Context
from uniql_jax.pallas_kernels.ssd.reference import boundary_states


def _taps(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    ssm = mamba2.ssm_of(config)
    return {"ssm_head": (ssm.head_dim, ssm.heads), "ssm_state": (ssm.state, ssm.groups)}


def _run(config: ModelConfig, leaves: Block, normed: Array, context: Context, taps: Taps) -> tuple[Array, Any]:
    empty = mamba2.empty_state(config, leaves, normed)
    inputs, state = mamba2.project(config, leaves, normed, context, empty)
    # A state acts through its entry of C alone, a channel through the gated value alone.
    inputs = inputs._replace(c=inputs.c + taps["ssm_state"])
    y, _ = mamba2.scan(config, leaves, inputs, state)
    value = mamba2.gated(y, inputs.z) + taps["ssm_head"]
    decay = -jnp.exp(leaves["a_log"].astype(jnp.float32))
    return mamba2.gated_norm(config, leaves["gate_norm"], value, normed.dtype), (value, inputs, decay)


def _statistics(
    config: ModelConfig, normed: Array, hidden: Array, seen: Any, slopes: Taps, thorough: bool
) -> Statistics:
    ssm = mamba2.ssm_of(config)
    value, inputs, decay = seen
    width = ssm.head_dim * ssm.heads
    felt = inputs.c * slopes["ssm_state"]  # [b, t, ds, g]
    steps = jnp.square(inputs.dt).reshape(*inputs.dt.shape[:2], ssm.groups, -1)
    stats = {
        "gram": gram(hidden, width),
        "gate_fisher": gram(value * slopes["ssm_head"], width),
        "state_fisher": jnp.einsum("btig,btjg->gij", felt, felt),
        "step_b": jnp.einsum("btdg,btgm->dgm", jnp.square(inputs.b), steps),
        "square_c": jnp.sum(jnp.square(inputs.c), axis=(0, 1)),
    }
    if thorough:
        states = boundary_states(inputs.x, inputs.dt, decay, inputs.b, chunk=ssm.chunk)  # [b, n, nh, hd, ds]
        tokens = inputs.x.shape[0] * inputs.x.shape[1]
        rows = states.transpose(0, 1, 4, 3, 2)
        # A mean over tokens is taken of every statistic; this one is a mean over its own rows.
        stats["gram_state"] = gram(rows, width) * (tokens / (rows.size / width))
    return stats


@functools.partial(jit, static_argnames=("config", "options"))
def _sort(config: ModelConfig, leaves: Block, stats: Statistics, options: CompressionSettings, seed: Seed) -> Sorted:
    ssm = mamba2.ssm_of(config)
    states = order_states(stats["step_b"], stats["square_c"], options.state_score, seed, stats["state_fisher"])
    out = elastic.reorder(config, "mamba2", leaves, "ssm_state", {"mamba_group": states})
    metric = stats["fisher"] if options.output_metric else None
    channels = order_head_channels(
        stats["gram"],
        leaves["out"],
        options.channel_score,
        seed,
        metric,
        stats["gate_fisher"],
        stats.get("gram_state"),
    )
    out = elastic.reorder(config, "mamba2", out, "ssm_head", {"mamba_head": channels})
    fisher = jax.vmap(lambda loss, index: loss[index][:, index])(stats["state_fisher"], states.T)
    # All heads are cut alike: what dropping ranks r and s costs is summed over all pairs of heads.
    flat = leaves["out"].reshape(-1, leaves["out"].shape[-1])
    loss = stats["gram"] * (flat @ stats["fisher"] @ flat.T)
    split = loss.reshape(ssm.head_dim, ssm.heads, ssm.head_dim, ssm.heads)
    split = jnp.take_along_axis(split, channels[:, :, None, None], axis=0)
    split = jnp.take_along_axis(split, channels[None, None], axis=2)
    return out, {"ssm_state": tail_loss(fisher).sum(0), "ssm_head": tail_loss(split.sum((1, 3)))}


SORTER = Sorter(_taps, _run, _statistics, _sort)
