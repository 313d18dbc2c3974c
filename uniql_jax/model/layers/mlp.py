"""The MLP block, gated or plain; its channels are elastic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from uniql_jax import elastic
from uniql_jax.config import ModelConfig
from uniql_jax.model.layers.context import Context
from uniql_jax.model.layers.linear import apply_columns, apply_rows
from uniql_jax.model.layers.norm import rms_norm

Leaves = Mapping[str, Any]

ACTIVATIONS = {"silu": jax.nn.silu, "relu2": lambda x: jnp.square(jax.nn.relu(x))}


def read(config: ModelConfig, leaves: Leaves, x: Float[Array, "b t h"]) -> Float[Array, "b t h"]:
    """What gate and up receive: the normed stream."""
    return rms_norm(x, leaves["norm"], config.norm_eps)


def inner(
    config: ModelConfig, leaves: Leaves, normed: Float[Array, "b t h"], context: Context
) -> Float[Array, "b t ffn"]:
    """What down receives: act(gate) * up, or act(up) where there is no gate."""
    up = apply_rows(normed, leaves["up"])
    if "up_bias" in leaves:
        up = up + leaves["up_bias"].astype(up.dtype)
    if "gate" not in leaves:
        return elastic.mask(ACTIVATIONS[config.activation](up), context.keep, "ffn", -1)
    gate = apply_rows(normed, leaves["gate"])
    if "gate_bias" in leaves:
        gate = gate + leaves["gate_bias"].astype(gate.dtype)
    return elastic.mask(ACTIVATIONS[config.activation](gate) * up, context.keep, "ffn", -1)


def write(leaves: Leaves, hidden: Float[Array, "b t ffn"]) -> Float[Array, "b t h"]:
    """Back to the residual stream."""
    y = apply_columns(hidden, leaves["down"])
    return y + leaves["down_bias"].astype(y.dtype) if "down_bias" in leaves else y


def init_state(
    config: ModelConfig, keep: Mapping[str, int], batch: int, slots: int, dtype: DTypeLike, bits: int = 16
) -> None:
    """An MLP remembers nothing."""
    return None


def cached_inner(
    config: ModelConfig, leaves: Leaves, normed: Float[Array, "b t h"], context: Context, state: None
) -> tuple[Float[Array, "b t ffn"], None]:
    """Same as `inner`."""
    return inner(config, leaves, normed, context), None
