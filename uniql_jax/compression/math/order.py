"""Orders from scores or from a pairwise loss matrix: most important first."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def descending(scores: Float[Array, " n"]) -> Int[Array, " n"]:
    """Indices from the highest score to the lowest; ties keep their order."""
    return jnp.argsort(-scores, stable=True)


@jax.jit
def greedy(loss: Float[Array, "n n"]) -> Int[Array, " n"]:
    """Indices, most important first, by dropping one after another the entry that adds least to the loss.

    Dropping the set D costs sum over i, j in D of loss[i, j] (symmetric; the squared error of the product whose
    terms are dropped), so an entry's price is loss[j, j] + 2 * (its coupling to what is already dropped).
    """
    count = loss.shape[0]

    def step(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        price, order = state
        drop = jnp.argmin(price)
        return (price + 2 * loss[drop]).at[drop].set(jnp.inf), order.at[count - 1 - i].set(drop)

    price, order = jnp.diagonal(loss), jnp.zeros(count, jnp.int32)
    return jax.lax.fori_loop(0, count, step, (price, order))[1]


def tail_loss(loss: Float[Array, "*g n n"]) -> Float[Array, "*g n+1"]:
    """For every count k = 0 ... n of kept leading entries, the sum of loss[i, j] over all dropped i, j >= k.

    loss is symmetric, so entry i brings loss[i, i] and twice its coupling to what comes after it.
    """
    brought = jnp.diagonal(loss, axis1=-2, axis2=-1) + 2 * jnp.sum(jnp.triu(loss, 1), axis=-1)
    total = jnp.cumsum(brought[..., ::-1], axis=-1)[..., ::-1]
    return jnp.concatenate([total, jnp.zeros_like(total[..., :1])], axis=-1)
