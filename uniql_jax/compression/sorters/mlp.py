"""Measuring and sorting MLP blocks: their channels."""

from __future__ import annotations

import functools
from typing import Any

from jaxtyping import Array

from uniql_jax import elastic
from uniql_jax.compiling import jit
from uniql_jax.compression.math.gram import gram
from uniql_jax.compression.math.mlp import order_channels
from uniql_jax.compression.math.order import tail_loss
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.compression.sorters.base import Block, Seed, Sorted, Sorter, Statistics, Taps
from uniql_jax.config import ModelConfig
from uniql_jax.model.layers import mlp
from uniql_jax.model.layers.context import Context


def _taps(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {"ffn": (config.intermediate_size,)}


def _run(config: ModelConfig, leaves: Block, normed: Array, context: Context, taps: Taps) -> tuple[Array, Any]:
    return mlp.inner(config, leaves, normed, context) + taps["ffn"], ()


def _statistics(
    config: ModelConfig, normed: Array, hidden: Array, seen: Any, slopes: Taps, thorough: bool
) -> Statistics:
    width = hidden.shape[-1]
    return {"gram": gram(hidden, width), "gate_fisher": gram(hidden * slopes["ffn"], width)}


@functools.partial(jit, static_argnames=("config", "options"))
def _sort(config: ModelConfig, leaves: Block, stats: Statistics, options: CompressionSettings, seed: Seed) -> Sorted:
    metric = stats["fisher"] if options.output_metric else None
    order = order_channels(stats["gram"], leaves["down"], options.mlp_score, seed, metric, stats["gate_fisher"])
    out = {name: value[order] if elastic.BLOCKS["mlp"][name].axis == "ffn" else value for name, value in leaves.items()}
    loss = stats["gram"] * (leaves["down"] @ stats["fisher"] @ leaves["down"].T)
    return out, {"ffn": tail_loss(loss[order][:, order])}


SORTER = Sorter(_taps, _run, _statistics, _sort)
