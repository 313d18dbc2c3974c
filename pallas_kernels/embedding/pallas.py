"""Embedding rows gathered and unpacked in one kernel: only the words of the rows asked for are read."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels import compat, selfcheck
from uniql_jax.pallas_kernels.compat import pl
from uniql_jax.pallas_kernels.embedding import reference
from uniql_jax.pallas_kernels.packing import SHIFTS

STORED_TILE = 256
"""Stored elements of one row that a program unpacks."""


def _kernel(
    tokens_ref: Any, data_ref: Any, scale_ref: Any, out_ref: Any, *, bits: int, group: int, width: int, tile: int
) -> None:
    token = jnp.clip(tokens_ref[pl.program_id(0)].astype(jnp.int32), 0, data_ref.shape[0] - 1)
    at = pl.program_id(1) * tile + jnp.arange(tile)
    packed = compat.load(data_ref, (token, at), at < data_ref.shape[1])
    per_word = 8 if bits == 4 else 1
    for lane in range(per_word):
        k = at * per_word + lane
        integers = ((packed >> SHIFTS[lane]) & 0xF) - 8 if bits == 4 else packed
        scale = compat.load(scale_ref, (token, k // group), k < width)
        weight = integers.astype(jnp.float32) * scale.astype(jnp.float32)
        compat.store(out_ref, (pl.program_id(0), k), weight, k < width)


def embed(
    tokens: Int[Array, "*lead"],
    data: Int[Array, "vocab stored"],
    scale: Float[Array, "vocab groups"],
    *,
    bits: int,
    group: int,
    width: int,
    dtype: jnp.dtype,
) -> Float[Array, "*lead width"]:
    """See api.embed. Raises NotImplementedError for float64 and when there is no token."""
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"the Pallas kernel writes 16-bit and 32-bit floats, not {dtype}")
    if tokens.size == 0:
        raise NotImplementedError("no token to embed")
    verify(bits)
    tile = min(STORED_TILE, pl.next_power_of_2(data.shape[1]))
    out = compat.call(
        functools.partial(_kernel, bits=bits, group=group, width=width, tile=tile),
        name=f"embed_{bits}",
        grid=(tokens.size, pl.cdiv(data.shape[1], tile)),
        out_shape=jax.ShapeDtypeStruct((tokens.size, width), dtype),
    )(tokens.reshape(-1), data, scale)
    return out.reshape(*tokens.shape, width)


def verify(bits: int) -> None:
    """Raise NotImplementedError when the kernel is wrong on this device."""
    selfcheck.require(f"embedding ({bits} bits)", functools.partial(_error, bits))


def _error(bits: int) -> float:
    """For `selfcheck`: rows of a table that fills no tile."""
    rng, found = np.random.default_rng(0), []
    low, high, stored = (-(2**31), 2**31 - 1, 10) if bits == 4 else (-128, 127, 80)
    data = jnp.asarray(rng.integers(low, high, (50, stored)), jnp.int32 if bits == 4 else jnp.int8)
    scale = jnp.asarray(rng.uniform(0.5, 1.0, (50, 5)), jnp.bfloat16)
    run = functools.partial(embed, bits=bits, group=16, width=77, dtype=jnp.dtype(jnp.bfloat16))
    for count in selfcheck.ROWS[::3]:
        tokens = jnp.asarray(rng.integers(0, 50, count), jnp.int32)
        want = selfcheck.expected(functools.partial(reference.embed, **run.keywords), tokens, data, scale)
        found.append(selfcheck.relative(jax.jit(run)(tokens, data, scale), want))
    return max(found)
