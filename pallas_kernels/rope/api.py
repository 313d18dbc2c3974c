"""Entry point of the rotary position embedding: checks its input and picks an implementation."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels import dispatch
from uniql_jax.pallas_kernels.rope import pallas, reference

ONE = {"reference": reference.rope, "pallas": pallas.rope}
BOTH = {"reference": reference.rope_qk, "pallas": pallas.rope_qk}


def check(x: Array, positions: Array, inv_freq: Array) -> None:
    """Raise ValueError, naming the shapes, when they do not fit each other."""
    if x.ndim != 5 or x.shape[3] != 2:
        raise ValueError(f"x is [batch, length, pairs, 2, heads], not {x.shape}")
    if positions.shape != x.shape[:2]:
        raise ValueError(f"positions {positions.shape} do not fit x {x.shape}: they are [batch, length]")
    if inv_freq.ndim != 2 or inv_freq.shape[0] != x.shape[2] or x.shape[4] % inv_freq.shape[1]:
        raise ValueError(f"inv_freq {inv_freq.shape} does not fit x {x.shape}: it is [pairs, a divisor of heads]")


def rope(
    x: Float[Array, "batch length pairs 2 heads"],
    positions: Int[Array, "batch length"],
    inv_freq: Float[Array, "pairs kv_heads"],
    *,
    implementation: str | None = None,
) -> Float[Array, "batch length pairs 2 heads"]:
    """Turn each pair of x by position * inv_freq radians; in x's dtype, computed in float32.

    Head i uses column i // (heads // kv_heads) of `inv_freq` (float32). Differentiable in x; positions and inv_freq
    are constants (zero gradient). Raises ValueError when the shapes do not fit.
    """
    check(x, positions, inv_freq)
    return dispatch.pick("rope", ONE, implementation)(x, positions, inv_freq)


def rope_qk(
    q: Float[Array, "batch length pairs 2 heads"],
    k: Float[Array, "batch length pairs 2 kv_heads"],
    positions: Int[Array, "batch length"],
    inv_freq: Float[Array, "pairs kv_heads"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch length pairs 2 heads"], Float[Array, "batch length pairs 2 kv_heads"]]:
    """`rope` of queries and keys in one pass; the number of heads of each is a multiple of inv_freq's columns."""
    check(q, positions, inv_freq)
    check(k, positions, inv_freq)
    return dispatch.pick("rope_qk", BOTH, implementation)(q, k, positions, inv_freq)
