"""The specification, in jnp: chunks as masked products, states carried from chunk to chunk; any pruned size."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LONGEST_CHUNK = 128
"""Products inside a chunk grow with its length; longer ones bring nothing."""


def _by_group(value: Float[Array, "..."], groups: int) -> Float[Array, "..."]:
    """[..., nh] -> [..., g, nh / g]."""
    return value.reshape(*value.shape[:-1], groups, -1)


def chunked(value: Float[Array, "b t ..."], chunk: int) -> Float[Array, "b n chunk ..."]:
    """Split the length into chunks; the last one is filled up with zeros."""
    batch, length, *rest = value.shape
    count = -(-length // chunk)
    widths = [(0, 0), (0, count * chunk - length)] + [(0, 0)] * len(rest)
    return jnp.pad(value.astype(jnp.float32), widths).reshape(batch, count, chunk, *rest)


class Kernels(NamedTuple):
    """The causal convolutions of x, B and C: their weights (the last one meets the newest token) and biases, if any."""

    x: Float[Array, "hd nh width"]
    b: Float[Array, "ds g width"]
    c: Float[Array, "ds g width"]
    x_bias: Float[Array, "hd nh"] | None = None
    b_bias: Float[Array, "ds g"] | None = None
    c_bias: Float[Array, "ds g"] | None = None


class Token(NamedTuple):
    """The projections of one token of every sequence; dt before its bias, softplus and limits."""

    z: Float[Array, "batch hd nh"]
    x: Float[Array, "batch hd nh"]
    b: Float[Array, "batch ds g"]
    c: Float[Array, "batch ds g"]
    dt: Float[Array, "batch nh"]


class Weights(NamedTuple):
    """What a block has between its projections: convolutions, steps, decays, skips, and the norm behind the gate."""

    kernels: Kernels
    dt_bias: Float[Array, " nh"]
    a_log: Float[Array, " nh"]
    d: Float[Array, " nh"]
    gate_norm: Float[Array, "hd nh"]


@dataclasses.dataclass(frozen=True)
class Limits:
    """Least and largest step, the norm's epsilon, and the channels that its mean counts: those before pruning."""

    dt_min: float
    dt_max: float
    eps: float
    norm_width: int


class Window(NamedTuple):
    """What one token leaves to the next: the last inputs of the convolutions, oldest first, and float32 states."""

    x: Float[Array, "batch before hd nh"]
    b: Float[Array, "batch before ds g"]
    c: Float[Array, "batch before ds g"]
    state: Float[Array, "batch nh hd ds"]


class Chunks(NamedTuple):
    """A sequence in chunks. Letters of the products: n chunk, l and s tokens of it, p channel, d state, g group, m head
    of a group.
    """

    inputs: Float[Array, "b n l p g m"]  # dt x
    decay: Float[Array, "b n l g m"]  # log of what is left, at l, of the state before the chunk
    b: Float[Array, "b n l d g"]
    added: Float[Array, "b n g m p d"]  # what the chunk adds to the state at its end
    starts: Float[Array, "n b g m p d"]  # states before every chunk
    last: Float[Array, "b g m p d"]  # state after the last


def _chunks(x: Array, dt: Array, a: Array, b: Array, state: Array, chunk: int) -> Chunks:
    batch, _, channels, heads = x.shape
    groups = b.shape[-1]
    steps = chunked(dt, chunk)
    inputs = _by_group(chunked(x, chunk) * steps[:, :, :, None], groups)
    decay = _by_group(jnp.cumsum(steps * a.astype(jnp.float32), axis=2), groups)
    b_chunks = chunked(b, chunk)
    added = jnp.einsum("bnsdg,bnspgm,bnsgm->bngmpd", b_chunks, inputs, jnp.exp(decay[:, :, -1:] - decay))
    whole = jnp.exp(decay[:, :, -1])

    def carry(before: Array, chunk_of: tuple[Array, Array]) -> tuple[Array, Array]:
        add, keep = chunk_of
        return before * keep[..., None, None] + add, before

    start = state.astype(jnp.float32).reshape(batch, groups, heads // groups, channels, -1)
    last, starts = jax.lax.scan(carry, start, (jnp.moveaxis(added, 1, 0), jnp.moveaxis(whole, 1, 0)))
    return Chunks(inputs, decay, b_chunks, added, starts, last)


def scan(
    x: Float[Array, "b t hd nh"],
    dt: Float[Array, "b t nh"],
    a: Float[Array, " nh"],
    b: Float[Array, "b t ds g"],
    c: Float[Array, "b t ds g"],
    state: Float[Array, "b nh hd ds"],
    *,
    chunk: int,
) -> tuple[Float[Array, "b t hd nh"], Float[Array, "b nh hd ds"]]:
    """See `api.scan`."""
    batch, length, channels, heads = x.shape
    chunk = min(chunk, LONGEST_CHUNK, length)
    inputs, decay, b_chunks, _, starts, last = _chunks(x, dt, a, b, state, chunk)
    c_chunks = chunked(c, chunk)
    # Inside a chunk: C_l . B_s, decayed from s to l.
    between = decay[:, :, :, None] - decay[:, :, None]  # [b, n, l, s, g, m]
    causal = jnp.tril(jnp.ones((chunk, chunk), bool))[:, :, None, None]
    weight = jnp.exp(jnp.where(causal, between, -jnp.inf))
    weight = weight * jnp.einsum("bnldg,bnsdg->bnlsg", c_chunks, b_chunks)[..., None]
    inside = jnp.einsum("bnlsgm,bnspgm->bnlpgm", weight, inputs)
    carried = jnp.einsum("bnldg,nbgmpd,bnlgm->bnlpgm", c_chunks, starts, jnp.exp(decay))
    y = (inside + carried).reshape(batch, -1, channels, heads)[:, :length]
    return y.astype(x.dtype), last.reshape(state.shape)


def boundary_states(
    x: Float[Array, "b t hd nh"],
    dt: Float[Array, "b t nh"],
    a: Float[Array, " nh"],
    b: Float[Array, "b t ds g"],
    *,
    chunk: int,
) -> Float[Array, "b n nh hd ds"]:
    """States at the end of every chunk, float32, of sequences that start from nothing (arguments as in `api.scan`)."""
    batch, length, channels, heads = x.shape
    empty = jnp.zeros((batch, heads, channels, b.shape[2]), jnp.float32)
    found = _chunks(x, dt, a, b, empty, min(chunk, LONGEST_CHUNK, length))
    ends = jnp.concatenate([found.starts[1:], found.last[None]])
    return jnp.moveaxis(ends, 0, 1).reshape(batch, -1, heads, channels, b.shape[2])


def step(
    x: Float[Array, "b hd nh"],
    dt: Float[Array, "b nh"],
    a: Float[Array, " nh"],
    b: Float[Array, "b ds g"],
    c: Float[Array, "b ds g"],
    state: Float[Array, "b nh hd ds"],
) -> tuple[Float[Array, "b hd nh"], Float[Array, "b nh hd ds"]]:
    """See `api.step`."""
    batch, channels, heads = x.shape
    groups = b.shape[-1]
    wide = (dt * a).astype(jnp.float32)
    inputs = _by_group(x.astype(jnp.float32) * dt[:, None], groups)
    grown = jnp.einsum("bpgm,bdg->bgmpd", inputs, b.astype(jnp.float32)).reshape(state.shape)
    state = state * jnp.exp(wide)[..., None, None] + grown
    split = state.reshape(batch, groups, heads // groups, channels, -1)
    y = jnp.einsum("bgmpd,bdg->bpgm", split, c.astype(jnp.float32)).reshape(x.shape)
    return y.astype(x.dtype), state


def _shifted(window: Float[Array, "b w ..."], value: Float[Array, "b ..."]) -> Float[Array, "b w ..."]:
    return jnp.concatenate([window, value[:, None].astype(window.dtype)], axis=1)[:, 1:]


def _convolved(
    value: Float[Array, "b ..."], window: Float[Array, "b w ..."], kernel: Float[Array, "..."], bias: Array | None
) -> Float[Array, "b ..."]:
    """SiLU of the causal convolution's newest output, in the value's dtype."""
    padded = jnp.concatenate([window.astype(value.dtype), value[:, None]], axis=1).astype(jnp.float32)
    total = sum(padded[:, k] * kernel[..., k].astype(jnp.float32) for k in range(kernel.shape[-1]))
    if bias is not None:
        total = total + bias.astype(jnp.float32)
    return jax.nn.silu(total).astype(value.dtype)


def mixer_step(
    token: Token, weights: Weights, windows: Window, limits: Limits
) -> tuple[Float[Array, "batch hd nh"], Window]:
    """See `api.mixer_step`."""
    kernels, dtype, groups = weights.kernels, token.x.dtype, token.b.shape[-1]
    after = {name: _shifted(getattr(windows, name), getattr(token, name)) for name in ("x", "b", "c")}
    x = _convolved(token.x, windows.x, kernels.x, kernels.x_bias)
    b = _convolved(token.b, windows.b, kernels.b, kernels.b_bias)
    c = _convolved(token.c, windows.c, kernels.c, kernels.c_bias)
    dt = jax.nn.softplus(token.dt.astype(jnp.float32) + weights.dt_bias.astype(jnp.float32))
    decay = -jnp.exp(weights.a_log.astype(jnp.float32))
    y, state = step(x, jnp.clip(dt, limits.dt_min, limits.dt_max), decay, b, c, windows.state)
    y = y + (weights.d.astype(jnp.float32) * x).astype(dtype)
    gated = y.astype(jnp.float32) * jax.nn.silu(token.z.astype(jnp.float32))
    split = _by_group(gated, groups)
    mean = jnp.sum(split * split, axis=(1, 3), keepdims=True) / limits.norm_width
    normed = (split * jax.lax.rsqrt(mean + limits.eps)).reshape(gated.shape)
    return normed.astype(dtype) * weights.gate_norm.astype(dtype), Window(**after, state=state)
