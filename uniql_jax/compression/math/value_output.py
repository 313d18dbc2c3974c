"""Quantization-aware SVD of the V/O product: lossless at full rank, best ranks first (method: V/O).

All scale goes into V and O gets orthonormal rows, which is kind to a 4-bit O.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.compression.math.order import tail_loss

METHODS = ("attention_output", "joint", "published", "random")


def square_root(gram: Float[Array, "... d d"]) -> Float[Array, "... d d"]:
    """R with R^T R = gram for symmetric positive semidefinite matrices; eigenvalues below zero count as zero."""
    values, vectors = jnp.linalg.eigh(gram)
    return jnp.sqrt(jnp.maximum(values, 0.0))[..., :, None] * jnp.swapaxes(vectors, -1, -2)


def decompose(
    o: Float[Array, "d n h"], gram: Float[Array, "g d d"], metric: Float[Array, "h h"] | None = None
) -> tuple[Float[Array, "g d d"], Float[Array, "d n h"]]:
    """(change of value basis per key/value head, new O): the same product per head, ranks sorted by what they carry.

    gram: what weighs the error, per key/value head, d x d. With O^T = Q2 R2 (the group's heads side by side) and
    R1^T R1 = gram, svd(R1 R2^T) = U S Z^T gives V' = V R2^T Z and O' = Z^T Q2^T. `metric` [h, h] weighs the error of
    the output as well: then O metric^1/2 takes the place of O in finding Z, and O' = Z^T R2^-T O.

    Factorizations run one after another: XLA's CPU thread pool can deadlock when two batched ones wait at once.
    """
    groups, d = gram.shape[:2]
    heads, hidden = o.shape[1:]
    stacked = o.reshape(d, groups, heads // groups, hidden).transpose(1, 0, 2, 3).reshape(groups, d, -1)
    weighed = stacked
    if metric is not None:
        floor = 1e-4 * jnp.mean(jnp.diagonal(metric)) * jnp.eye(hidden)
        root = jax.block_until_ready(square_root(metric + floor))
        weighed = (stacked.reshape(groups, d, -1, hidden) @ root.T).reshape(stacked.shape)
    q2, r2 = jax.block_until_ready(jnp.linalg.qr(jnp.swapaxes(weighed, -1, -2)))
    core = square_root(gram) @ jnp.swapaxes(r2, -1, -2)
    zt = jax.block_until_ready(jnp.linalg.svd(jax.block_until_ready(core))[2])
    change = zt @ r2
    if metric is None:
        flat = zt @ jnp.swapaxes(q2, -1, -2)
    else:
        flat = jax.block_until_ready(jnp.linalg.solve(jnp.swapaxes(change, -1, -2), stacked))
        # Rows of equal size are kind to a 4-bit O; their scale moves into V.
        scale = jnp.linalg.norm(flat, axis=-1, keepdims=True)
        flat, change = flat / scale, change * scale
    return change, flat.reshape(groups, d, heads // groups, hidden).transpose(1, 0, 2, 3).reshape(o.shape)


def published(
    v: Float[Array, "d g h"], o: Float[Array, "d n h"], gram_x: Float[Array, "h h"]
) -> tuple[Float[Array, "g d d"], Float[Array, "d n h"]]:
    """The published route for shared heads looks at V alone: SVD of C^1/2 W_V per head; O follows by its basis."""
    root = jax.block_until_ready(square_root(gram_x))
    zt = jax.block_until_ready(jnp.linalg.svd(root @ v.transpose(1, 2, 0), full_matrices=False)[2])
    d, groups, hidden = v.shape
    grouped = o.reshape(d, groups, -1, hidden)
    return zt, jnp.einsum("grd,dgmh->rgmh", zt, grouped).reshape(o.shape)


def sort_value_output(
    v: Float[Array, "d g h"],
    o: Float[Array, "d n h"],
    gram_out: Float[Array, "g d d"],
    gram_x: Float[Array, "h h"],
    method: str = "attention_output",
    seed: Int[Array, ""] | int = 0,
    metric: Float[Array, "h h"] | None = None,
) -> tuple[Float[Array, "g d d"], Float[Array, "d g h"], Float[Array, "d n h"]]:
    """(change, V, O) with ranks sorted; V is `change` times the old V, per key/value head.

    gram_out: Gram of what o_proj receives, summed over the heads of each group; gram_x: Gram of V's input; metric:
    Gram of the loss gradient at the output, used by attention_output. attention_output weighs by gram_out, joint by
    W_V C W_V^T, published ignores O, random permutes the given basis. ValueError for another method.
    """
    d, groups, _ = v.shape
    if method == "attention_output":
        change, new_o = decompose(o, gram_out, metric)
    elif method == "joint":
        change, new_o = decompose(o, jnp.einsum("dgh,hk,egk->gde", v, gram_x, v))
    elif method == "published":
        change, new_o = published(v, o, gram_x)
    elif method == "random":
        order = jax.random.permutation(jax.random.key(seed), d)
        change, new_o = jnp.broadcast_to(jnp.eye(d)[order], (groups, d, d)), o[order]
    else:
        raise ValueError(f"unknown V/O method {method!r}; one of {', '.join(METHODS)}")
    return change, jnp.einsum("grk,kgh->rgh", change, v), new_o


def rank_loss(
    change: Float[Array, "g d d"], new_o: Float[Array, "d n h"], gram_out: Float[Array, "g d d"], metric: Array
) -> Float[Array, " d+1"]:
    """Loss of keeping the leading k ranks, k = 0 ... d: what the dropped ranks add to the output, weighed by `metric`
    [h, h] and summed over key/value heads (query heads of a group are averaged).
    """
    groups, d = change.shape[:2]
    received = jnp.einsum("grd,gde,gse->grs", change, gram_out, change)
    grouped = new_o.reshape(d, groups, -1, new_o.shape[-1])
    written = jnp.einsum("rgmh,hk,sgmk->grs", grouped, metric, grouped) / grouped.shape[2]
    return tail_loss(received * written).sum(0)
