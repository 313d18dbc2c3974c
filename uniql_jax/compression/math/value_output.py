"""Quantization-aware SVD of the V/O product: lossless for every rank of V and O, best ranks first (method: V/O).

All scale goes into V, and the rows of O get one norm, which is kind to a 4-bit O.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from threadpoolctl import threadpool_limits

from uniql_jax.compiling import jit
from uniql_jax.compression.finite import first_nonfinite
from uniql_jax.compression.math.order import tail_loss
from uniql_jax.compression.settings import VALUE_OUTPUTS

EPS = float(np.finfo(np.float32).eps)
RANK_CUTOFF = 4 * EPS
"""A singular value below this part of the largest is what rounding to float32 leaves of a zero."""
METRIC_FLOOR = 1e-4
"""What every output counts at least, as a part of the metric's mean diagonal: bounds the condition of the change."""


def row_space(
    matrix: Float[np.ndarray, "d n"],
) -> tuple[Float[np.ndarray, "d 1"], Float[np.ndarray, " k"], Float[np.ndarray, "d k"]]:
    """(norms of rows, singular values, left singular vectors) of a matrix, its rows scaled to norm one; float64.

    Their number k is the numerical rank. In float64 the Gram matrix serves: it resolves singular values to 1e-8 of the
    largest, below what float32 weights hold, in a fraction of an SVD's time.
    """
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    scaled = matrix / np.where(norms == 0, 1.0, norms)
    values, vectors = np.linalg.eigh(scaled @ scaled.T)
    values, vectors = values[::-1], vectors[:, ::-1]
    rank = int(np.sum(values > RANK_CUTOFF**2 * values[0]))
    return norms, np.sqrt(values[:rank]), vectors[:, :rank]


def row_basis(
    matrix: Float[np.ndarray, "d n"],
) -> tuple[Float[np.ndarray, "d k"], Float[np.ndarray, "k n"]]:
    """The rank factorization matrix = left @ basis with orthonormal rows in `basis`, float64.

    Since rows are scaled to one norm first, each keeps its relative precision however small it is, and a zero row is
    exactly zero in `left`.
    """
    norms, values, vectors = row_space(matrix)
    return norms * vectors * values, (vectors / values).T @ (matrix / np.where(norms == 0, 1.0, norms))


def within_values(v: Float[np.ndarray, "d h"], o: Float[np.ndarray, "d n"]) -> Float[np.ndarray, "d n"]:
    """The part of O that V reaches, float64: the same V^T O, and nothing where V holds linearly dependent rows."""
    norms, _, vectors = row_space(v)
    if vectors.shape[1] == len(v):
        return o
    scaled = norms * o
    kept = vectors @ (vectors.T @ scaled)
    # What rounding leaves of a zero row is zero.
    kept[np.linalg.norm(kept, axis=1) <= 1e-13 * np.linalg.norm(scaled, axis=1).max()] = 0.0
    return kept / np.where(norms == 0, 1.0, norms)


@functools.partial(jit, static_argnames="hidden")
def _weighed(basis: Float[Array, "g d n"], metric: Float[Array, "h h"], hidden: int) -> Float[Array, "g d d"]:
    """basis (I x metric) basis^T, the metric repeated for every query head."""
    heads = basis.reshape(*basis.shape[:2], -1, hidden)
    return jnp.einsum("gdmh,hk,gemk->gde", heads, metric, heads, precision="highest")


@jit
def _apply(matrix: Float[Array, "g d d"], basis: Float[Array, "g d n"]) -> Float[Array, "g d n"]:
    return jnp.matmul(matrix, basis, precision="highest")


@jit
def _turned(basis: Float[Array, "g d d"], weight: Float[Array, "d n h"]) -> Float[Array, "d n h"]:
    """The weight of all heads with the ranks of each group in its new basis."""
    grouped = weight.reshape(weight.shape[0], basis.shape[0], -1, weight.shape[-1])
    return jnp.einsum("grd,dgmh->rgmh", basis, grouped, precision="highest").reshape(weight.shape)


def _small_factors(
    left: Float[np.ndarray, "d k"], gram: Float[np.ndarray, "d d"], weight: Float[np.ndarray, "k k"]
) -> tuple[Float[np.ndarray, "k d"], Float[np.ndarray, "k k"]]:
    """(change, turn) of one key/value head: O' = turn @ basis, and change^T @ turn = left; float64.

    weight = root @ root^T is well conditioned by its floor. With R^T R = gram, svd(R left root) = U S Z^T gives
    change^T = left root Z and turn = Z^T root^-1; the rank and the scale of O stay in `left`, which is never inverted.
    """
    # Channels scaled to one size, so that what rounding leaves of a large one does not hide a small one.
    sizes = np.sqrt(np.maximum(np.diagonal(gram), 0.0))
    sizes = np.where(sizes > 0, sizes, np.min(sizes, where=sizes > 0, initial=np.inf) if sizes.any() else 1.0)
    values, vectors = np.linalg.eigh(gram / sizes / sizes[:, None])
    # Directions that carry nothing are kept, last, in the order of what O makes of them.
    root_gram = np.sqrt(np.maximum(values, 0.0) + EPS)[:, None] * vectors.T * sizes
    values, vectors = np.linalg.eigh(weight)
    root = np.sqrt(values) * vectors
    zt = np.linalg.svd(root_gram @ left @ root, full_matrices=False)[2]
    turn = zt / np.sqrt(values) @ vectors.T
    norms = np.linalg.norm(turn, axis=1, keepdims=True)
    return norms * (zt @ root.T @ left.T), turn / norms


def decompose(
    o: Float[Array, "d n h"],
    gram: Float[Array, "g d d"],
    metric: Float[Array, "h h"] | None = None,
    v: Float[Array, "d g h"] | None = None,
) -> tuple[Float[Array, "g d d"], Float[Array, "d n h"]]:
    """The same product V O per head, its ranks sorted by what they carry.

    Per key/value head, with its query heads' O one after another, the parts of O of every rank are those of the SVD of
    gram^1/2 O metric^1/2: no other choice of as many ranks has a smaller weighed error. Small factorizations run in
    float64 on the host; products with metric and basis run on the device.

    Args:
        o: output weight, float32, n query heads in g groups.
        gram: weighs the error on the side of the values; positive semidefinite, of any rank.
        metric: weighs the error of the output; positive semidefinite, of any rank. None weighs all outputs alike.
        v: value weight. Where given, O loses what V does not reach.

    Returns:
        (change, new O) with V' = change V. Rows of O have norm one, and are orthogonal without a metric. Ranks that
        carry nothing come last, with zeros in `change` and O.

    Raises:
        ValueError: an input is not finite.
    """
    bad = first_nonfinite({"o": o, "gram": gram, "metric": metric, "v": v})
    if bad:
        raise ValueError(f"cannot decompose the V/O product: {bad} holds values that are not finite")
    groups, d = gram.shape[:2]
    heads, hidden = o.shape[1:]
    grams = np.asarray(gram, np.float64)
    stacked = _by_group(np.asarray(o), groups)
    values = None if v is None else np.asarray(v)

    def reachable(g: int) -> tuple[np.ndarray, np.ndarray]:
        mine = stacked[g].astype(np.float64)
        if values is not None:
            mine = within_values(values[:, g].astype(np.float64), mine)
        return row_basis(mine)

    basis = np.zeros(stacked.shape, np.float32)
    found = _each(reachable, groups)
    for g, (_, rows) in enumerate(found):
        basis[g, : len(rows)] = rows
    on_device = jax.device_put(basis)
    weights = _output_weights(on_device, metric, hidden)
    change, turn = np.zeros((2, groups, d, d), np.float32)

    def factors(g: int) -> None:
        left = found[g][0]
        rank = left.shape[1]
        if rank:
            change[g, :rank], turn[g, :rank, :rank] = _small_factors(left, grams[g], weights[g, :rank, :rank])

    _each(factors, groups)
    new = _apply(turn, on_device).reshape(groups, d, heads // groups, hidden)
    return jax.device_put(change), new.transpose(1, 0, 2, 3).reshape(o.shape)


def _each(function: Callable[[int], Any], groups: int) -> list[Any]:
    """`function` of every group, side by side. BLAS gets one thread for each: its own threads take longer to meet than
    such small factorizations take, and results should not depend on their number.
    """
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(min(groups, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, range(groups)))


def _by_group(o: Float[np.ndarray, "d n h"], groups: int) -> Float[np.ndarray, "g d mh"]:
    """O of a group's query heads side by side."""
    d, heads, hidden = o.shape
    return o.reshape(d, groups, heads // groups, hidden).transpose(1, 0, 2, 3).reshape(groups, d, -1)


def _output_weights(
    basis: Float[Array, "g d n"], metric: Float[Array, "h h"] | None, hidden: int
) -> Float[np.ndarray, "g d d"]:
    """What the metric makes of a basis, float64, floor included; the identity for no metric and for zero."""
    eye = np.eye(basis.shape[1])
    peak = 0.0 if metric is None else float(jnp.max(jnp.abs(metric)))
    if metric is None or peak == 0:
        return np.broadcast_to(eye, (basis.shape[0], *eye.shape))
    metric = metric / peak
    floor = METRIC_FLOOR * float(jnp.mean(jnp.diagonal(metric)))
    weights = np.asarray(_weighed(basis, metric, hidden), np.float64)
    with threadpool_limits(1, "blas"):
        values, vectors = np.linalg.eigh((weights + weights.swapaxes(-1, -2)) / 2)
    return (vectors * (np.maximum(values, 0.0) + floor)[..., None, :]) @ vectors.swapaxes(-1, -2)


def published(
    v: Float[Array, "d g h"], o: Float[Array, "d n h"], gram_x: Float[Array, "h h"]
) -> tuple[Float[Array, "g d d"], Float[Array, "d n h"]]:
    """The published route for shared heads looks at V alone: SVD of C^1/2 W_V per head; O follows by its basis.

    Its right singular vectors are the eigenvectors of W_V C W_V^T (UniQL, joint SVD of shared heads).

    Args:
        v: the value weight.
        o: the output weight of all query heads.
        gram_x: mean outer product of what V reads, float32.

    Returns:
        The change of basis of every key/value head, and O in the new basis.
    """
    carried = np.asarray(_carried(v, gram_x), np.float64)
    with threadpool_limits(1, "blas"):
        vectors = np.linalg.eigh(carried)[1]
    zt = jnp.asarray(vectors[..., ::-1].swapaxes(-1, -2), jnp.float32)
    return zt, _turned(zt, o)


@jit
def _carried(v: Float[Array, "d g h"], gram_x: Float[Array, "h h"]) -> Float[Array, "g d d"]:
    """Gram of the values, from that of V's input."""
    found = jnp.einsum("dgh,hk,egk->gde", v, gram_x, v, precision="highest")
    return (found + jnp.swapaxes(found, -1, -2)) / 2


def sort_value_output(
    v: Float[Array, "d g h"],
    o: Float[Array, "d n h"],
    gram_out: Float[Array, "g d d"],
    gram_x: Float[Array, "h h"],
    method: str = "attention_output",
    seed: Int[Array, ""] | int = 0,
    metric: Float[Array, "h h"] | None = None,
) -> tuple[Float[Array, "g d d"], Float[Array, "d g h"], Float[Array, "d n h"]]:
    """V and O with their ranks sorted, most important first; V has no bias (it is folded into O's).

    Args:
        v: value weight, float32.
        o: output weight, float32.
        gram_out: Gram of what O receives, summed over the heads of each group.
        gram_x: Gram of V's input.
        method: attention_output weighs by gram_out and the metric; joint weighs by W_V C W_V^T; published ignores O;
            random permutes the given basis.
        seed: of the random method.
        metric: Gram of the loss gradient at the output.

    Returns:
        (change, V, O); V is `change` times the old V, per key/value head.

    Raises:
        ValueError: the method is unknown, or an input is not finite.
    """
    d, groups, _ = v.shape
    if method == "attention_output":
        change, new_o = decompose(o, gram_out, metric, v)
    elif method == "joint":
        change, new_o = decompose(o, _carried(v, gram_x), None, v)
    elif method == "published":
        change, new_o = published(v, o, gram_x)
    elif method == "random":
        order = jax.random.permutation(jax.random.key(seed), d)
        change, new_o = jnp.broadcast_to(jnp.eye(d)[order], (groups, d, d)), o[order]
    else:
        raise ValueError(f"unknown V/O method {method!r}; one of {', '.join(VALUE_OUTPUTS)}")
    return change, _turned(change, v), new_o


@jit
def rank_loss(
    change: Float[Array, "g d d"], new_o: Float[Array, "d n h"], gram_out: Float[Array, "g d d"], metric: Array
) -> Float[Array, " d+1"]:
    """Loss of keeping the leading k ranks, k = 0 ... d.

    Args:
        change: the new value basis per key/value head.
        new_o: the output weight in that basis.
        gram_out: Gram of what O receives, in the old basis.
        metric: weighs the outputs, [h, h].

    Returns:
        What the dropped ranks add to the output, summed over key/value heads (query heads of a group are averaged).
    """
    groups, d = change.shape[:2]
    received = jnp.einsum("grd,gde,gse->grs", change, gram_out, change)
    grouped = new_o.reshape(d, groups, -1, new_o.shape[-1])
    written = jnp.einsum("rgmh,hk,sgmk->grs", grouped, metric, grouped) / grouped.shape[2]
    return tail_loss(received * written).sum(0)
