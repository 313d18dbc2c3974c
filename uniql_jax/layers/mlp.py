"""The gated MLP block; its channels are elastic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from uniql_jax import elastic
from uniql_jax.config import ModelConfig
from uniql_jax.layers.context import Context
from uniql_jax.layers.linear import apply_columns, apply_rows
from uniql_jax.layers.norm import rms_norm

Leaves = Mapping[str, Any]


def read(config: ModelConfig, leaves: Leaves, x: Float[Array, "b t h"]) -> Float[Array, "b t h"]:
    """What gate and up receive: the normed stream."""
    return rms_norm(x, leaves["norm"], config.norm_eps)


def inner(
    config: ModelConfig, leaves: Leaves, normed: Float[Array, "b t h"], context: Context
) -> Float[Array, "b t ffn"]:
    """What down receives: act(gate) * up."""
    gate, up = apply_rows(normed, leaves["gate"]), apply_rows(normed, leaves["up"])
    if "gate_bias" in leaves:
        gate, up = gate + leaves["gate_bias"].astype(gate.dtype), up + leaves["up_bias"].astype(up.dtype)
    return elastic.mask(jax.nn.silu(gate) * up, context.keep, "ffn", -1)


def write(leaves: Leaves, hidden: Float[Array, "b t ffn"]) -> Float[Array, "b t h"]:
    """Back to the residual stream."""
    y = apply_columns(hidden, leaves["down"])
    return y + leaves["down_bias"].astype(y.dtype) if "down_bias" in leaves else y


def init_state(config: ModelConfig, keep: Mapping[str, int], batch: int, slots: int, dtype: DTypeLike) -> None:
    """An MLP remembers nothing."""
    return None


def cached_inner(
    config: ModelConfig, leaves: Leaves, normed: Float[Array, "b t h"], context: Context, state: None
) -> tuple[Float[Array, "b t ffn"], None]:
    """Same as `inner`."""
    return inner(config, leaves, normed, context), None
