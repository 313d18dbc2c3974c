"""Entry point of attention of one token per sequence over a cache: checks its input and picks an implementation."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from uniql_jax.pallas_kernels import dispatch
from uniql_jax.pallas_kernels.attention import decode_pallas, decode_reference
from uniql_jax.pallas_kernels.attention.decode_reference import Caches as Caches
from uniql_jax.pallas_kernels.attention.decode_reference import Place as Place
from uniql_jax.pallas_kernels.attention.decode_reference import Token as Token

IMPLEMENTATIONS = {"reference": decode_reference.decode, "pallas": decode_pallas.decode}


def check(token: Token, caches: Caches, inv_freq: Array | None, place: Place) -> None:
    """Raise ValueError, naming the shapes, when a token, its caches and its rotation do not fit each other."""
    q, k, v = token.q, token.k, token.v
    if q.ndim != 4 or k.shape[:3] != q.shape[:3] or q.shape[3] % k.shape[3]:
        raise ValueError(f"q {q.shape} and k {k.shape} are [batch, qk, pair, heads], k's heads a divisor of q's")
    groups = k.shape[3]
    if v.ndim != 3 or v.shape[0] != q.shape[0] or v.shape[2] != groups:
        raise ValueError(f"v {v.shape} does not fit k {k.shape}: it is [batch, ranks, kv heads]")
    passed = 0
    if (token.q_pass is None) != (token.k_pass is None):
        raise ValueError("q_pass and k_pass come together or not at all")
    if token.q_pass is not None and token.k_pass is not None:
        passed = token.q_pass.shape[1]
        if token.q_pass.shape != (q.shape[0], passed, q.shape[3]) or token.k_pass.shape != (q.shape[0], passed, groups):
            raise ValueError(f"q_pass {token.q_pass.shape} and k_pass {token.k_pass.shape} do not fit q {q.shape}")
    slots = caches.k.shape[1] if caches.k.ndim == 4 else 0
    wide = (q.shape[0], slots, groups)
    if caches.k.shape != (*wide, q.shape[1] * q.shape[2] + passed) or caches.v.shape != (*wide, v.shape[1]):
        raise ValueError(f"caches {caches.k.shape} and {caches.v.shape} do not fit q {q.shape} and v {v.shape}")
    if inv_freq is not None and (inv_freq.shape != (q.shape[1], groups) or q.shape[2] != 2):
        raise ValueError(f"inv_freq {inv_freq.shape} does not fit q {q.shape}: it is [pairs, kv heads]")
    for name, scale in (("k_scale", caches.k_scale), ("v_scale", caches.v_scale)):
        if (scale is None) != (caches.k.dtype != jnp.int8) or (scale is not None and scale.shape != wide):
            raise ValueError(f"caches of {caches.k.dtype} have {name} of shape {wide} if they are int8, else none")
    if place.start is not None and place.start.shape != q.shape[:1]:
        raise ValueError(f"start {place.start.shape} does not fit q {q.shape}: it is [batch]")


def decode(
    token: Token,
    caches: Caches,
    inv_freq: Float[Array, "qk g"] | None,
    place: Place,
    *,
    scale: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "b vo n"], Caches]:
    """Attend from one new token of every sequence to what its cache holds and to itself.

    The token is rotated by its position (slot less start) times inv_freq, not at all when that is None, and written to
    its slot of the caches.
    `scale` multiplies the scores: that of the ORIGINAL head size. Returns what the output matrix receives, in q's
    dtype, and the caches after the token. Scores and softmax are float32. Not differentiable under "pallas". Raises
    ValueError when shapes do not fit.
    """
    check(token, caches, inv_freq, place)
    run = dispatch.pick("attention.decode", IMPLEMENTATIONS, implementation)
    return run(token, caches, inv_freq, place, scale=scale)
