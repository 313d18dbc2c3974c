"""Entry point of attention of many queries (prompts, training): checks its input and picks an implementation."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Int

from uniql_jax.pallas_kernels import dispatch
from uniql_jax.pallas_kernels.attention import cached, cudnn, jaxtriton, reference
from uniql_jax.pallas_kernels.attention.caches import Caches

CACHED = {"reference": cached.cached_attention, "jax-triton": jaxtriton.cached_attention}
CAUSAL = {"reference": reference.causal_attention, "cudnn": cudnn.causal_attention}


def check(q: Array, k: Array, v: Array) -> None:
    """Raise ValueError, naming the shapes, when they do not fit each other."""
    if any(x.ndim != 4 for x in (q, k, v)):
        raise ValueError(f"q, k and v are [batch, length, heads, width], not {q.shape}, {k.shape} and {v.shape}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(f"k {k.shape} does not fit q {q.shape}: its heads divide q's, batch and width are the same")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"v {v.shape} does not fit k {k.shape}: all but the width is the same")


def causal_attention(
    q: Float[Array, "b t n dk"],
    k: Float[Array, "b t g dk"],
    v: Float[Array, "b t g dv"],
    valid: Bool[Array, "b t"] | None = None,
    *,
    scale: float | int,
    implementation: str | None = None,
) -> Float[Array, "b t n dv"]:
    """Softmax attention of tokens to themselves and to those before them.

    Query head i reads key/value head i // (n // g). Scores are scaled by `scale`, and they and the softmax are float32;
    the result is in q's dtype. Tokens where `valid` (None: everywhere true) is false are padding, wherever they sit:
    nobody sees them, and their own result is zero. Memory grows with t, not with its square. Differentiable in q, k, v.
    Raises ValueError when the shapes do not fit.
    """
    check(q, k, v)
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"{q.shape[1]} queries have {k.shape[1]} keys: here they are of the same tokens")
    if valid is not None and valid.shape != q.shape[:2]:
        raise ValueError(f"valid {valid.shape} does not fit q {q.shape}: it is [batch, length]")
    return dispatch.pick("causal_attention", CAUSAL, implementation)(q, k, v, valid, scale=scale)


def cached_attention(
    q: Float[Array, "b t n dk"],
    caches: Caches,
    start: Int[Array, " b"] | None,
    slot: Int[Array, ""] | int,
    *,
    scale: float | int,
    implementation: str | None = None,
) -> Float[Array, "b t n dv"]:
    """Attention of new tokens to a cache that holds them from `slot` on: each sees itself and the ones before it.

    Args:
        q: rotated queries.
        caches: keys and values of all slots, in 16, 32 or 8 bits.
        start: first slot of each row that holds a token; what lies before is never read. None: 0 everywhere.
        slot: slot of the first query's token.
        scale: multiplies the scores.
        implementation: of one query a row, in place of the default; of several there is one alone.

    Returns:
        The result in q's dtype; zeros for a query before its row's start.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    check(q, caches.k, caches.v)
    if start is not None and start.shape != q.shape[:1]:
        raise ValueError(f"start {start.shape} does not fit q {q.shape}: it is [batch]")
    run = dispatch.pick("cached_attention", CACHED, implementation) if q.shape[1] == 1 else cached.cached_attention
    return run(q, caches, start, slot, scale=scale)
