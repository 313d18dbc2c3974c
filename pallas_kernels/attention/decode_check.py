"""What attention over a cache is tried on before it is trusted on a device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from uniql_jax.pallas_kernels import selfcheck
from uniql_jax.pallas_kernels.attention import cached, decode_reference
from uniql_jax.pallas_kernels.attention.caches import Caches, quantize
from uniql_jax.pallas_kernels.attention.decode_reference import Place, Token

PAIRS, GROUPS, HEADS, RANKS, SLOTS, SLOT = 9, 2, 6, 20, 150, 131
"""None fills a tile; several programs share the slots."""
CASES = ((1, False, 16), (5, True, 8), (33, True, 16), (64, True, 8))
"""Sequences, whether each begins at a slot of its own, and bits of the cache."""


def error(decode: Callable[..., tuple[Array, Caches]]) -> float:
    """The largest relative error of a kernel's output, and of the caches up to the slot that it writes."""
    rng = np.random.default_rng(0)
    run = functools.partial(decode, scale=0.2)
    want = functools.partial(decode_reference.decode, scale=0.2)
    return max(_error(run, want, _arguments(rng, *case)) for case in CASES)


def _arguments(rng: np.random.Generator, batch: int, padded: bool, bits: int) -> tuple[Any, ...]:
    def normal(*shape: int) -> Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    token = Token(normal(batch, PAIRS, 2, HEADS), normal(batch, PAIRS, 2, GROUPS), normal(batch, RANKS, GROUPS))
    k, v = normal(batch, SLOTS, GROUPS, 2 * PAIRS), normal(batch, SLOTS, GROUPS, RANKS)
    caches = Caches(k, v)
    if bits == 8:
        (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
        caches = Caches(k, v, k_scale, v_scale)
    start = jnp.asarray(rng.integers(0, SLOT + 1, batch), jnp.int32) if padded else None
    inv_freq = jnp.asarray(rng.uniform(0.01, 1.0, (PAIRS, GROUPS)), jnp.float32)
    return token, caches, inv_freq, Place(start, jnp.int32(SLOT))


def _error(run: Callable[..., Any], want: Callable[..., Any], args: tuple[Any, ...]) -> float:
    return selfcheck.relative(jax.jit(lambda *args: run(*args))(*args), selfcheck.expected(want, *args))


def cached_error(cached_attention: Callable[..., Array]) -> float:
    """The same of a kernel that finds the rotated token in the cache already."""
    rng, found = np.random.default_rng(0), []
    run = functools.partial(cached_attention, scale=0.2)
    want = functools.partial(cached.cached_attention, scale=0.2)
    for case in CASES:
        _, caches, _, place = _arguments(rng, *case)
        q = jnp.asarray(rng.standard_normal((case[0], 1, HEADS, 2 * PAIRS)), jnp.bfloat16)
        found.append(_error(run, want, (q, caches, *place)))
    return max(found)
