"""Orders from scores or from a pairwise loss matrix: most important first."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def descending(scores: Float[Array, " n"]) -> Int[Array, " n"]:
    """Indices from the highest score to the lowest; ties keep their order."""
    return jnp.argsort(-scores, stable=True)


def unit_peak(values: Float[Array, "..."]) -> Float[Array, "..."]:
    """Values over their largest magnitude, for what follows of their ratios alone and might overflow."""
    peak = jnp.max(jnp.abs(values))
    return values / jnp.where(peak == 0, 1.0, peak)


@jax.jit
def greedy(loss: Float[Array, "n n"]) -> Int[Array, " n"]:
    """Indices, most important first, by dropping one after another the entry that adds least to the loss.

    Dropping the set D costs sum over i, j in D of loss[i, j] (the squared error of the product whose terms are
    dropped), so an entry's price is loss[j, j] + 2 * (its coupling to what is already dropped).

    Args:
        loss: symmetric, of any size.

    Returns:
        A permutation, whatever the values; of equals the later one is dropped first.
    """
    count = loss.shape[0]
    loss = unit_peak(loss)
    most = jnp.finfo(loss.dtype).max

    def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        price, left, order = state
        asked = jnp.where(left, jnp.nan_to_num(price, nan=most, posinf=most), jnp.inf)
        drop = count - 1 - jnp.argmin(asked[::-1])
        return price + 2 * loss[drop], left.at[drop].set(False), order.at[count - 1 - i].set(drop)

    begin = jnp.diagonal(loss), jnp.ones(count, bool), jnp.zeros(count, jnp.int32)
    return jax.lax.fori_loop(0, count, step, begin)[2]


def tail_loss(loss: Float[Array, "*g n n"]) -> Float[Array, "*g n+1"]:
    """The loss of keeping the leading k entries, for k = 0 ... n.

    Args:
        loss: symmetric matrices.

    Returns:
        The sum of loss[i, j] over all dropped i, j >= k: entry i brings loss[i, i] and twice its coupling to what comes
        after it.
    """
    brought = jnp.diagonal(loss, axis1=-2, axis2=-1) + 2 * jnp.sum(jnp.triu(loss, 1), axis=-1)
    total = jnp.cumsum(brought[..., ::-1], axis=-1)[..., ::-1]
    return jnp.concatenate([total, jnp.zeros_like(total[..., :1])], axis=-1)
