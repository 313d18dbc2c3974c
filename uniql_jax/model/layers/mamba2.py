"""The Mamba2 block: projections, causal convolutions, state-space scan, gated norm.

Channels of every head and states are elastic. The gated norm divides by its original width, so that masked, sliced
and zero-padded heads give the same result. Time steps, decay and states are float32 throughout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from uniql_jax import elastic
from uniql_jax.config import ModelConfig, Ssm
from uniql_jax.model.cache import SsmCache
from uniql_jax.model.layers.context import Context
from uniql_jax.model.layers.linear import apply_columns, apply_rows
from uniql_jax.model.layers.norm import rms_norm
from uniql_jax.pallas_kernels import ssd
from uniql_jax.weights.shard import total_of_neighbors

Leaves = Mapping[str, Any]


class Inputs(NamedTuple):
    """What the scan and the gate receive: after the projections, the convolutions and the masks."""

    z: Float[Array, "b t hd nh"]
    x: Float[Array, "b t hd nh"]
    b: Float[Array, "b t ds g"]
    c: Float[Array, "b t ds g"]
    dt: Float[Array, "b t nh"]


def ssm_of(config: ModelConfig) -> Ssm:
    """The SSM sizes of a model that has such blocks."""
    assert config.ssm is not None
    return config.ssm


def read(config: ModelConfig, leaves: Leaves, x: Float[Array, "b t h"]) -> Float[Array, "b t h"]:
    """What the input projections receive: the normed stream."""
    return rms_norm(x, leaves["norm"], config.norm_eps)


def _project(leaves: Leaves, name: str, normed: Array) -> Float[Array, "b t ..."]:
    y = apply_rows(normed, leaves[name])
    bias = leaves.get("dt_proj_bias" if name == "dt" else f"{name}_bias")
    return y if bias is None else y + bias.astype(y.dtype)


def _convolve(
    leaves: Leaves, name: str, value: Float[Array, "b t ..."], before: Float[Array, "b w ..."]
) -> Float[Array, "b t ..."]:
    """SiLU of the causal convolution of every channel; `before` holds the inputs that precede."""
    kernel = leaves[f"conv_{name}"].astype(jnp.float32)
    length = value.shape[1]
    padded = jnp.concatenate([before.astype(value.dtype), value], axis=1).astype(jnp.float32)
    total = sum(padded[:, k : k + length] * kernel[..., k] for k in range(kernel.shape[-1]))
    if f"conv_{name}_bias" in leaves:
        total = total + leaves[f"conv_{name}_bias"].astype(jnp.float32)
    return jax.nn.silu(total).astype(value.dtype)


def project(
    config: ModelConfig, leaves: Leaves, normed: Float[Array, "b t h"], context: Context, state: SsmCache
) -> tuple[Inputs, SsmCache]:
    """Projections and convolutions; the state comes back with the last inputs of the convolutions.

    Padding enters as zeros and with a step of zero, so it changes neither.
    """
    ssm = ssm_of(config)
    real = context.valid[:, :, None]
    dt = jax.nn.softplus(_project(leaves, "dt", normed).astype(jnp.float32) + leaves["dt_bias"].astype(jnp.float32))
    dt = jnp.where(real, jnp.clip(dt, ssm.dt_min, ssm.dt_max), 0.0)
    convolved, last = {}, {}
    for name, axis in (("x", "ssm_head"), ("b", "ssm_state"), ("c", "ssm_state")):
        value = jnp.where(real[..., None], _project(leaves, name, normed), 0)
        before = getattr(state, name)
        kept = jnp.concatenate([before, value.astype(before.dtype)], axis=1)
        count = value.shape[1] if context.count is None else context.count
        last[name] = jax.lax.dynamic_slice_in_dim(kept, count, before.shape[1], axis=1)
        convolved[name] = elastic.mask(_convolve(leaves, name, value, before), context.keep, axis, 2)
    z = elastic.mask(_project(leaves, "z", normed), context.keep, "ssm_head", 2)
    return Inputs(z=z, dt=dt, **convolved), dataclasses.replace(state, **last)


def scan(
    config: ModelConfig, leaves: Leaves, inputs: Inputs, state: SsmCache
) -> tuple[Float[Array, "b t hd nh"], SsmCache]:
    """The state-space scan and the skip D x."""
    decay = -jnp.exp(leaves["a_log"].astype(jnp.float32))
    if inputs.x.shape[1] == 1:
        one = Inputs(*(value[:, 0] for value in inputs))
        y, after = ssd.step(one.x, one.dt, decay, one.b, one.c, state.state)
        y = y[:, None]
    else:
        chunk = ssm_of(config).chunk
        y, after = ssd.scan(inputs.x, inputs.dt, decay, inputs.b, inputs.c, state.state, chunk=chunk)
    return y + (leaves["d"].astype(jnp.float32) * inputs.x).astype(y.dtype), dataclasses.replace(state, state=after)


def gated(y: Float[Array, "b t hd nh"], z: Float[Array, "b t hd nh"]) -> Float[Array, "b t hd nh"]:
    """y SiLU(z), float32: what the gated norm receives."""
    return y.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))


def gated_norm(
    config: ModelConfig, weight: Float[Array, "hd nh"], value: Float[Array, "b t hd nh"], dtype: DTypeLike
) -> Float[Array, "b t hd nh"]:
    """RMS norm over the heads of each group; the mean counts the ORIGINAL channels, whatever was cut."""
    ssm = ssm_of(config)
    split = value.reshape(*value.shape[:3], ssm.groups, -1)
    square = jnp.sum(split * split, axis=(2, 4), keepdims=True)
    if ssm.norm_devices is not None:
        square = total_of_neighbors(square, *ssm.norm_devices)
    normed = (split * jax.lax.rsqrt(square / ssm.group_width + config.gate_norm_eps)).reshape(value.shape)
    return normed.astype(dtype) * weight.astype(dtype)


def inner(
    config: ModelConfig, leaves: Leaves, normed: Float[Array, "b t h"], context: Context
) -> Float[Array, "b t hd nh"]:
    """What out receives, over whole sequences."""
    return cached_inner(config, leaves, normed, context, empty_state(config, leaves, normed))[0]


def write(leaves: Leaves, hidden: Float[Array, "b t hd nh"]) -> Float[Array, "b t h"]:
    """Back to the residual stream."""
    y = apply_columns(hidden, leaves["out"])
    return y + leaves["out_bias"].astype(y.dtype) if "out_bias" in leaves else y


def empty_state(config: ModelConfig, leaves: Leaves, normed: Float[Array, "b t h"]) -> SsmCache:
    """The state before the first token, at the sizes of these leaves."""
    keep = {"ssm_head": leaves["x"].shape[0], "ssm_state": leaves["b"].shape[0]}
    return init_state(config, keep, normed.shape[0], 0, normed.dtype)


def init_state(
    config: ModelConfig, keep: Mapping[str, int], batch: int, slots: int, dtype: DTypeLike, bits: int = 16
) -> SsmCache:
    """Zeros, sized for the kept channels and states; it does not grow with the text."""
    ssm = ssm_of(config)
    channels, states = int(keep["ssm_head"]), int(keep["ssm_state"])
    shared = jnp.zeros((batch, ssm.conv - 1, states, ssm.groups), dtype)
    return SsmCache(
        x=jnp.zeros((batch, ssm.conv - 1, channels, ssm.heads), dtype),
        b=shared,
        c=jnp.zeros_like(shared),
        state=jnp.zeros((batch, ssm.heads, channels, states), jnp.float32),
    )


def cached_inner(
    config: ModelConfig, leaves: Leaves, normed: Float[Array, "b t h"], context: Context, state: SsmCache
) -> tuple[Float[Array, "b t hd nh"], SsmCache]:
    """What out receives when earlier tokens left a state, and the state after these."""
    inputs, state = project(config, leaves, normed, context, state)
    y, state = scan(config, leaves, inputs, state)
    return gated_norm(config, leaves["gate_norm"], gated(y, inputs.z), normed.dtype), state
