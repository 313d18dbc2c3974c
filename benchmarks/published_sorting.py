"""Sorting as published before: pseudo-inverses and square roots of whole Gram matrices, at one prune rate.

MoDeGPT (arXiv 2408.09632), which UniQL (arXiv 2512.03383) compares its sorting with: a Nystroem approximation of the
MLP, CR selection of Q and K, an SVD of V and O between square roots of the inputs' Gram matrix. Written in plain JAX
for `compress_steps.py`, where it is timed next to ours; `baselines/modegpt.py` measures what it is worth.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@functools.partial(jax.jit, static_argnames=("keep", "hermitian"))
def nystroem_mlp(
    gram: Float[Array, "f f"], down: Float[Array, "f h"], keep: int, hermitian: bool = False
) -> tuple[Int[Array, " k"], Float[Array, "k h"]]:
    """The channels that an MLP keeps, by ridge leverage, and its output matrix fitted to them.

    Args:
        gram: mean outer product of what the output matrix receives.
        down: the output matrix.
        keep: channels kept.
        hermitian: take the pseudo-inverse by eigenvalues rather than singular values, which is faster.

    Returns:
        Indices, most important first, and the output matrix of those channels.
    """
    chosen = jnp.argsort(-leverage(gram))[:keep]
    inner = gram[chosen][:, chosen]
    return chosen, jnp.linalg.pinv(inner, hermitian=hermitian) @ (gram[chosen] @ down)


@jax.jit
def leverage(gram: Float[Array, "f f"]) -> Float[Array, " f"]:
    """Ridge leverage of every channel, [C (C + l I)^-1]_jj; the ridge is the mean of the diagonal."""
    ridge = jnp.mean(jnp.diagonal(gram))
    return jnp.diagonal(gram @ jnp.linalg.inv(gram + ridge * jnp.eye(len(gram))))


@functools.partial(jax.jit, static_argnames="keep")
def cr_pairs(gram_q: Float[Array, "g m d d"], gram_k: Float[Array, "g d d"], keep: int) -> Int[Array, "g k"]:
    """The features of queries and keys that every key/value head keeps: products of the columns' norms in the square
    roots of both Gram matrices, summed over the query heads of a group.
    """
    of_q = jnp.linalg.norm(square_root(gram_q), axis=-2).sum(1)
    of_k = jnp.linalg.norm(square_root(gram_k), axis=-2)
    return jnp.argsort(-of_q * of_k, axis=-1)[:, :keep]


@functools.partial(jax.jit, static_argnames="keep")
def svd_value_output(
    gram: Float[Array, "h h"], value: Float[Array, "g d h"], output: Float[Array, "g m d h"], keep: int
) -> tuple[Float[Array, "g k h"], Float[Array, "g m k h"]]:
    """V and O of every key/value head at a lower rank: singular vectors of V behind the square root of the inputs' Gram
    matrix [h, h], then of O in their basis.

    Args:
        gram: mean outer product of what V reads.
        value: rows of V by head.
        output: rows of O by head of a group.
        keep: ranks kept.

    Returns:
        The narrower V and O.
    """
    root = square_root(gram)
    inverse = jnp.linalg.pinv(root)

    def one(value: Array, output: Array) -> tuple[Array, Array]:
        left, sizes, right = jnp.linalg.svd(root @ value.T, full_matrices=False)  # [h, d], [d], [d, d]
        heads, _, hidden = output.shape
        turned = sizes[:, None] * jnp.einsum("ed,mdh->emh", right, output).reshape(len(sizes), heads * hidden)
        basis, found, other = jnp.linalg.svd(turned, full_matrices=False)
        narrow = inverse @ (left @ basis[:, :keep])
        kept = (found[:, None] * other)[:keep].reshape(keep, heads, hidden).swapaxes(0, 1)
        return narrow.T, kept

    return jax.lax.map(lambda pair: one(*pair), (value, output))


def square_root(gram: Float[Array, "*b n n"]) -> Float[Array, "*b n n"]:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = jnp.linalg.eigh(gram)
    return (vectors * jnp.sqrt(jnp.maximum(values, 0.0))[..., None, :]) @ vectors.swapaxes(-1, -2)
