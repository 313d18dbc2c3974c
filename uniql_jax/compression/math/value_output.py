"""Quantization-aware SVD of the V/O product: lossless at full rank, best ranks first (method: V/O).

All scale goes into V and O gets orthonormal rows, which is kind to a 4-bit O.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from uniql_jax.compression.math.order import tail_loss
from uniql_jax.compression.settings import VALUE_OUTPUTS

METHODS = VALUE_OUTPUTS
CUTOFF = 1e-7
"""Singular values of O below this part of the largest are rounding of float32 weights, not content."""
FLOOR = 1e-4
"""Every output counts at least this part of the mean."""


def square_root(gram: Float[Array, "... d d"]) -> Float[Array, "... d d"]:
    """R with R^T R = gram for symmetric positive semidefinite matrices; eigenvalues below zero count as zero."""
    values, vectors = jnp.linalg.eigh(gram)
    return jnp.sqrt(jnp.maximum(values, 0.0))[..., :, None] * jnp.swapaxes(vectors, -1, -2)


def decompose(
    o: Float[Array | np.ndarray, "d n h"], gram: Float[Array, "g d d"], metric: Float[Array, "h h"] | None = None
) -> tuple[Float[Array, "g d d"], Float[Array, "d n h"]]:
    """A new basis of the values of each key/value head: the same product with O, ranks sorted by what they carry.

    With the heads of a group next to each other, O = U S W^T up to its numerical rank r, W^T having orthonormal rows.
    What those rows receive is S U^T v; its Gram matrix is R1^T R1, and that of what they write, weighed by `metric`,
    is K = R2^T R2. svd(R1 R2^T) = P T Z^T sorts the ranks: V' = Z^T R2 S U^T V and O' = Z^T R2^-T W^T. R2 is well
    conditioned whatever O is, so nothing singular is ever inverted; ranks beyond r are exact zeros.

    Args:
        o: output matrix, [head size, query heads, hidden].
        gram: Gram matrix of what O receives, per key/value head [g, d, d].
        metric: Gram matrix of the loss gradient at the output [h, h]; None weighs all outputs alike.

    Returns:
        The change of basis [g, d, d], float32, and the new O, whose rows have norm one where they are not zero: all
        scale is in V.

    Source: method, V/O. The factorizations are of d x d matrices in float64 on the host, which finds the numerical rank
    of float32 weights reliably and is small work next to the Gram matrices.
    """
    groups, d = gram.shape[:2]
    heads, hidden = o.shape[1:]
    shared = heads // groups
    stacked = np.asarray(o, np.float64).reshape(d, groups, shared * hidden).transpose(1, 0, 2)
    bases = [_row_space(rows) for rows in stacked]
    rows = np.zeros((groups, d, shared * hidden), np.float32)
    for group, (_, basis) in enumerate(bases):
        rows[group, : len(basis)] = basis
    written = _written(jnp.asarray(rows.reshape(groups, d, shared, hidden)), metric)
    change, new_o = np.zeros((groups, d, d)), np.zeros(stacked.shape)
    for group, (received, basis) in enumerate(bases):
        rank = len(basis)
        seen = received @ np.asarray(gram[group], np.float64) @ received.T
        turn, back = _ordered(seen, written[group, :rank, :rank])
        flat = back @ basis
        scale = np.linalg.norm(flat, axis=1, keepdims=True)
        change[group, :rank] = turn @ received * scale
        new_o[group, :rank] = flat / scale
    new_o = new_o.reshape(groups, d, shared, hidden).transpose(1, 0, 2, 3).reshape(o.shape)
    return jnp.asarray(change, jnp.float32), jnp.asarray(new_o, jnp.float32)


def _row_space(o: Float[np.ndarray, "d n"]) -> tuple[Float[np.ndarray, "r d"], Float[np.ndarray, "r n"]]:
    """(S U^T, W^T) of O = U S W^T, without the singular values that float32 weights cannot mean."""
    q, r = np.linalg.qr(o.T)
    u, s, wt = np.linalg.svd(r.T)
    rank = int(np.sum(s > CUTOFF * s[0])) if s[0] > 0 else 0
    return s[:rank, None] * u[:, :rank].T, wt[:rank] @ q.T


def _written(rows: Float[Array, "g d m h"], metric: Float[Array, "h h"] | None) -> Float[np.ndarray, "g d d"]:
    """Gram matrices of what orthonormal rows write, weighed by the metric over its mean diagonal and a small floor."""
    mean = 0.0 if metric is None else float(jnp.mean(jnp.diagonal(metric)))
    if metric is None or not mean > 0:
        return np.broadcast_to(np.eye(rows.shape[1]), (rows.shape[0], rows.shape[1], rows.shape[1]))
    weighed = jnp.einsum("grmh,hk,gsmk->grs", rows, metric / mean, rows)
    return np.asarray(weighed, np.float64) + FLOOR * np.eye(rows.shape[1])


def _ordered(
    seen: Float[np.ndarray, "r r"], written: Float[np.ndarray, "r r"]
) -> tuple[Float[np.ndarray, "r r"], Float[np.ndarray, "r r"]]:
    """(Z^T R2, Z^T R2^-T) that sort ranks by what is received and written together."""
    values, vectors = np.linalg.eigh(written)
    values = np.maximum(values, 1e-7 * values.max(initial=0.0) + np.finfo(np.float64).tiny)
    received, directions = np.linalg.eigh(seen)
    root = np.sqrt(np.maximum(received, 0.0))[:, None] * directions.T
    r2 = np.sqrt(values)[:, None] * vectors.T
    zt = np.linalg.svd(root @ r2.T)[2]
    return zt @ r2, zt @ (vectors.T / np.sqrt(values)[:, None])


def published(
    v: Float[Array, "d g h"], o: Float[Array, "d n h"], gram_x: Float[Array, "h h"]
) -> tuple[Float[Array, "g d d"], Float[Array, "d n h"]]:
    """The published route for shared heads looks at V alone: SVD of C^1/2 W_V per head; O follows by its basis."""
    root = jax.block_until_ready(square_root(gram_x))
    d, groups, hidden = v.shape
    zt = jax.block_until_ready(jnp.linalg.svd(root @ v.transpose(1, 2, 0), full_matrices=hidden < d)[2])
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
        change, new_o = decompose(_reached(v, o), gram_out, metric)
    elif method == "joint":
        change, new_o = decompose(_reached(v, o), jnp.einsum("dgh,hk,egk->gde", v, gram_x, v))
    elif method == "published":
        change, new_o = published(v, o, gram_x)
    elif method == "random":
        order = jax.random.permutation(jax.random.key(seed), d)
        change, new_o = jnp.broadcast_to(jnp.eye(d)[order], (groups, d, d)), o[order]
    else:
        raise ValueError(f"unknown V/O method {method!r}; one of {', '.join(METHODS)}")
    return change, jnp.einsum("grk,kgh->rgh", change, v), new_o


def _reached(v: Float[Array, "d g h"], o: Float[Array, "d n h"]) -> Float[np.ndarray | Array, "d n h"]:
    """O without what no value reaches, where values of a group are linearly dependent or zero: the same product."""
    d, groups, _ = v.shape
    directions = []
    for rows in np.asarray(v, np.float64).transpose(1, 0, 2):
        u, s, _ = np.linalg.svd(np.linalg.qr(rows.T)[1].T)
        directions.append(u[:, : len(s)] * (s > CUTOFF * s[0]) if s[0] > 0 else np.zeros((d, d)))
    if all(basis.shape[1] == d and basis.any(axis=0).all() for basis in directions):
        return o
    grouped = np.asarray(o, np.float64).reshape(d, groups, -1)
    reached = [basis @ (basis.T @ grouped[:, group]) for group, basis in enumerate(directions)]
    return np.stack(reached, axis=1).reshape(o.shape).astype(np.float32)


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
