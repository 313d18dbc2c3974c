"""Quantization-aware SVD of the V/O product: lossless at full rank, best ranks first (method: V/O).

All scale goes into V and O gets orthonormal rows, which is kind to a 4-bit O.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

METHODS = ("attention_output", "joint", "published", "random")


def square_root(gram: Float[Array, "... d d"]) -> Float[Array, "... d d"]:
    """R with R^T R = gram for symmetric positive semidefinite matrices; eigenvalues below zero count as zero."""
    values, vectors = jnp.linalg.eigh(gram)
    return jnp.sqrt(jnp.maximum(values, 0.0))[..., :, None] * jnp.swapaxes(vectors, -1, -2)


def decompose(
    v: Float[Array, "d g h"],
    o: Float[Array, "d n h"],
    gram: Float[Array, "g d d"],
    metric: Float[Array, "h h"] | None = None,
) -> tuple[Float[Array, "d g h"], Float[Array, "d n h"]]:
    """New V and O with the same product per head, ranks sorted by how much they carry.

    v, o: leaves of the attention block; gram: what weighs the error, per key/value head, d x d. With
    O^T = Q2 R2 (the group's heads side by side) and R1^T R1 = gram, svd(R1 R2^T) = U S Z^T gives
    V' = V R2^T Z and O' = Z^T Q2^T. `metric` [h, h] weighs the error of the output as well: then O metric^1/2 takes
    the place of O in finding Z, and O' = Z^T R2^-T O.
    """
    d, groups, _ = v.shape
    heads = o.shape[1]
    stacked = o.reshape(d, groups, heads // groups, -1).transpose(1, 0, 2, 3).reshape(groups, d, -1)
    weighed = stacked
    if metric is not None:
        root = square_root(metric + 1e-4 * jnp.mean(jnp.diagonal(metric)) * jnp.eye(metric.shape[0]))
        weighed = (stacked.reshape(groups, d, -1, o.shape[-1]) @ root.T).reshape(stacked.shape)
    q2, r2 = jnp.linalg.qr(jnp.swapaxes(weighed, -1, -2))
    core = square_root(gram) @ jnp.swapaxes(r2, -1, -2)
    # The right singular vectors alone: eigenvectors of core^T core, taken from an SVD for its relative accuracy.
    zt = jnp.linalg.svd(core)[2]
    change = zt @ r2
    if metric is None:
        flat = zt @ jnp.swapaxes(q2, -1, -2)
    else:
        flat = jnp.linalg.solve(jnp.swapaxes(change, -1, -2), stacked)
        # Rows of equal size are kind to a 4-bit O; their scale moves into V.
        scale = jnp.linalg.norm(flat, axis=-1, keepdims=True)
        flat, change = flat / scale, change * scale
    new_o = flat.reshape(groups, d, heads // groups, -1)
    new_v = jnp.einsum("grk,kgh->rgh", change, v)
    return new_v, new_o.transpose(1, 0, 2, 3).reshape(d, heads, -1)


def published(
    v: Float[Array, "d g h"], o: Float[Array, "d n h"], gram_x: Float[Array, "h h"]
) -> tuple[Float[Array, "d g h"], Float[Array, "d n h"]]:
    """The published route for shared heads, which looks at V alone: SVD of C^1/2 W_V per head, O follows by its basis."""
    weights = v.transpose(1, 2, 0)  # [g, h, d]
    zt = jnp.linalg.svd(square_root(gram_x) @ weights, full_matrices=False)[2]
    d, groups, _ = v.shape
    grouped = o.reshape(d, groups, -1, o.shape[-1])
    new_o = jnp.einsum("grd,dgmh->rgmh", zt, grouped).reshape(o.shape)
    return jnp.einsum("grd,dgh->rgh", zt, v), new_o


def sort_value_output(
    v: Float[Array, "d g h"],
    o: Float[Array, "d n h"],
    gram_out: Float[Array, "g d d"],
    gram_x: Float[Array, "h h"],
    method: str = "attention_output",
    seed: Int[Array, ""] | int = 0,
    metric: Float[Array, "h h"] | None = None,
) -> tuple[Float[Array, "d g h"], Float[Array, "d n h"]]:
    """V and O with ranks sorted.

    gram_out: Gram of what o_proj receives, summed over the heads of each group; gram_x: Gram of V's input.
    metric: Gram of the loss gradient at the output, used by attention_output. attention_output weighs by gram_out, joint by W_V C W_V^T, published ignores O, random permutes the given basis.
    """
    if method == "attention_output":
        return decompose(v, o, gram_out, metric)
    if method == "joint":
        return decompose(v, o, jnp.einsum("dgh,hk,egk->gde", v, gram_x, v))
    if method == "published":
        return published(v, o, gram_x)
    if method == "random":
        order = jax.random.permutation(jax.random.key(seed), v.shape[0])
        return v[order], o[order]
    raise ValueError(f"unknown V/O method {method!r}; one of {', '.join(METHODS)}")
