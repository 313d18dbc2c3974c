"""The specification, in jnp: chunks as masked products, states carried from chunk to chunk. Works at any pruned size."""

from __future__ import annotations

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
    """See `api.scan`. Letters of the products: n chunk, l and s tokens of it, p channel, g group, m head of a group."""
    batch, length, channels, heads = x.shape
    groups, chunk = b.shape[-1], min(chunk, LONGEST_CHUNK, length)
    steps = chunked(dt, chunk)
    inputs = _by_group(chunked(x, chunk) * steps[:, :, :, None], groups)  # dt x
    decay = _by_group(jnp.cumsum(steps * a.astype(jnp.float32), axis=2), groups)  # [b, n, l, g, m]
    b_chunks, c_chunks = chunked(b, chunk), chunked(c, chunk)

    # Inside a chunk: C_l . B_s, decayed from s to l.
    between = decay[:, :, :, None] - decay[:, :, None]  # [b, n, l, s, g, m]
    causal = jnp.tril(jnp.ones((chunk, chunk), bool))[:, :, None, None]
    weight = jnp.exp(jnp.where(causal, between, -jnp.inf))
    weight = weight * jnp.einsum("bnldg,bnsdg->bnlsg", c_chunks, b_chunks)[..., None]
    inside = jnp.einsum("bnlsgm,bnspgm->bnlpgm", weight, inputs)

    # From chunk to chunk.
    to_end = jnp.exp(decay[:, :, -1:] - decay)
    added = jnp.einsum("bnsdg,bnspgm,bnsgm->bngmpd", b_chunks, inputs, to_end)
    whole = jnp.exp(decay[:, :, -1])  # [b, n, g, m]

    def carry(before: Array, chunk_of: tuple[Array, Array]) -> tuple[Array, Array]:
        add, keep = chunk_of
        return before * keep[..., None, None] + add, before

    start = state.astype(jnp.float32).reshape(batch, groups, heads // groups, channels, -1)
    last, starts = jax.lax.scan(carry, start, (jnp.moveaxis(added, 1, 0), jnp.moveaxis(whole, 1, 0)))
    carried = jnp.einsum("bnldg,nbgmpd,bnlgm->bnlpgm", c_chunks, starts, jnp.exp(decay))
    y = (inside + carried).reshape(batch, -1, channels, heads)[:, :length]
    return y.astype(x.dtype), last.reshape(state.shape)


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
