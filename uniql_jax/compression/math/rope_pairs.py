"""Order of the RoPE pairs, or of the plain dimensions, of each key/value head, shared by the query heads of its group
(method: Q/K).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.compression.math.order import descending, greedy, unit_peak
from uniql_jax.compression.settings import PAIR_SCORES


def pair_loss(
    gram_q: Float[Array, "g m d d"], gram_k: Float[Array, "g d d"], width: int = 2
) -> Float[Array, "g pairs pairs"]:
    """Expected squared change of the scores when pairs are dropped, as a symmetric matrix per key/value head.

    A constant added to a row of scores cancels in the softmax, hence the mean-free keys.

    Args:
        gram_q: mean outer products of rotated queries, per key/value head and query head of it.
        gram_k: mean outer products of rotated, mean-free keys.
        width: features of a pair: 2, features (2p, 2p + 1) being pair p, or 1 without RoPE.

    Returns:
        The loss of dropping two pairs together, whose diagonal is that of one pair.
    """
    product = jnp.einsum("gmij,gij->gij", gram_q, gram_k)
    groups, pairs = product.shape[0], product.shape[1] // width
    return product.reshape(groups, pairs, width, pairs, width).sum((2, 4))


def order_pairs(
    gram_q: Float[Array, "g m d d"],
    gram_k: Float[Array, "g d d"],
    method: str = "energy",
    seed: Int[Array, ""] | int = 0,
    gate_fisher: Float[Array, "g pairs pairs"] | None = None,
    *,
    width: int = 2,
) -> Int[Array, "pairs g"]:
    """Pair indices per key/value head, most important first.

    energy: sum over query heads of tr(C_Q C_K) of the pair's 2 x 2 blocks; greedy: the same with couplings between
    pairs; fisher and fisher_diagonal: the Gram of the loss gradient with respect to a gate on every pair, with and
    without couplings; published: product of the norms of the pair's columns of C_Q^1/2 and C_K^1/2, UniQL's score;
    random: a baseline.

    Args:
        gram_q: as for `pair_loss`.
        gram_k: as for `pair_loss`.
        method: one of `settings.PAIR_SCORES`.
        seed: of the random order.
        gate_fisher: Gram of the loss gradient with respect to a gate on every pair.
        width: features of a pair, 1 for dimensions that do not rotate.

    Returns:
        A permutation of the pairs for every key/value head, int32.

    Raises:
        ValueError: an unknown method, or one whose matrix is missing.
    """
    groups, pairs = gram_k.shape[0], gram_k.shape[1] // width
    if method == "random":
        keys = jax.random.split(jax.random.key(seed), groups)
        return jax.vmap(lambda key: jax.random.permutation(key, pairs))(keys).T
    if method == "published":
        # The norm of column j of C^1/2 is sqrt(C_jj): no eigendecomposition is needed.
        norm_q = jnp.sqrt(jnp.sum(jnp.diagonal(gram_q, axis1=-2, axis2=-1), axis=1))
        norm_k = jnp.sqrt(jnp.diagonal(gram_k, axis1=-2, axis2=-1))
        return jax.vmap(descending)((norm_q * norm_k).reshape(groups, pairs, width).sum(-1)).T
    if method == "fisher" and gate_fisher is not None:
        return jax.vmap(greedy)(gate_fisher).T
    if method == "fisher_diagonal" and gate_fisher is not None:
        return jax.vmap(lambda matrix: descending(jnp.diagonal(matrix)))(gate_fisher).T
    loss = pair_loss(unit_peak(gram_q), unit_peak(gram_k), width)
    if method == "greedy":
        return jax.vmap(greedy)(loss).T
    if method == "energy":
        return jax.vmap(lambda matrix: descending(jnp.diagonal(matrix)))(loss).T
    raise ValueError(f"unknown RoPE-pair score {method!r}; one of {', '.join(PAIR_SCORES)}")
