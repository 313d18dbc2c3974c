"""Order of the states of an SSM group and of the channels of an SSM head (UniQL, state-aware sorting; method: SSM)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.compression.math.mlp import leverage
from uniql_jax.compression.math.order import descending, greedy, unit_peak
from uniql_jax.compression.settings import CHANNEL_SCORES, STATE_SCORES


def order_states(
    step_b: Float[Array, "ds g m"],
    square_c: Float[Array, "ds g"],
    method: str = "energy",
    seed: Int[Array, ""] | int = 0,
    gate_fisher: Float[Array, "g ds ds"] | None = None,
) -> Int[Array, "ds g"]:
    """State indices per group, most important first.

    energy sums the product of the roots of `step_b` and `square_c` over the heads (UniQL's score, with the true step).

    Args:
        step_b: mean square of (step * B) for each of the group's m heads.
        square_c: mean square of C.
        method: one of `settings.STATE_SCORES`.
        seed: of the random order.
        gate_fisher: Gram of the loss gradient with respect to a gate on every state, for fisher and fisher_diagonal.

    Returns:
        A permutation of the states for every group, int32.

    Raises:
        ValueError: an unknown method, or one whose matrix is missing.
    """
    if method == "random":
        keys = jax.random.split(jax.random.key(seed), square_c.shape[1])
        return jax.vmap(lambda key: jax.random.permutation(key, square_c.shape[0]))(keys).T
    if method == "energy":
        return jax.vmap(descending, 1, 1)(unit_peak(jnp.sqrt(step_b)).sum(-1) * unit_peak(jnp.sqrt(square_c)))
    if method == "fisher" and gate_fisher is not None:
        return jax.vmap(greedy)(gate_fisher).T
    if method == "fisher_diagonal" and gate_fisher is not None:
        return jax.vmap(lambda matrix: descending(jnp.diagonal(matrix)))(gate_fisher).T
    raise ValueError(f"unknown SSM state score {method!r}; one of {', '.join(STATE_SCORES)}")


def per_head(matrix: Float[Array, "w w"], heads: int) -> Float[Array, "heads hd hd"]:
    """The blocks of a matrix over [channel, head] that pair channels of one head.

    Args:
        matrix: rows and columns are channels, the head index being the fastest.
        heads: number of heads.

    Returns:
        One matrix over the channels of each head.
    """
    channels = matrix.shape[0] // heads
    return jnp.einsum("inkn->nik", matrix.reshape(channels, heads, channels, heads))


def order_head_channels(
    gram: Float[Array, "w w"],
    out: Float[Array, "hd nh h"],
    method: str = "fisher",
    seed: Int[Array, ""] | int = 0,
    metric: Float[Array, "h h"] | None = None,
    gate_fisher: Float[Array, "w w"] | None = None,
    gram_state: Float[Array, "w w"] | None = None,
) -> Int[Array, "hd nh"]:
    """Channel indices per head, most important first; matrices are over [channel, head], w = hd * nh.

    fisher, fisher_diagonal, greedy, energy and magnitude as for MLP channels; state_aware and gated_output are ridge
    leverage scores of gram_state and gram (UniQL's two variants).

    Args:
        gram: of what the output matrix receives.
        out: the output matrix.
        method: one of `settings.CHANNEL_SCORES`.
        seed: of the random order.
        metric: Gram of the loss gradient at the block's output; None weighs all outputs alike.
        gate_fisher: Gram of the loss gradient with respect to a gate on every channel before the gated norm.
        gram_state: Gram of the states at the ends of chunks.

    Returns:
        A permutation of the channels for every head, int32.

    Raises:
        ValueError: an unknown method, or one whose matrix is missing.
    """
    channels, heads, hidden = out.shape
    if method == "random":
        keys = jax.random.split(jax.random.key(seed), heads)
        return jax.vmap(lambda key: jax.random.permutation(key, channels))(keys).T
    if method == "fisher" and gate_fisher is not None:
        return jax.vmap(greedy)(per_head(gate_fisher, heads)).T
    if method == "greedy":
        flat = unit_peak(out).reshape(-1, hidden)
        loss = unit_peak(gram) * ((flat if metric is None else flat @ unit_peak(metric)) @ flat.T)
        return jax.vmap(greedy)(per_head(loss, heads)).T
    if method == "fisher_diagonal" and gate_fisher is not None:
        scores = jnp.diagonal(gate_fisher)
    elif method == "energy":
        scores = jnp.diagonal(gram)
    elif method == "state_aware" and gram_state is not None:
        scores = leverage(gram_state)
    elif method == "gated_output":
        scores = leverage(gram)
    elif method == "magnitude":
        scores = jnp.sum(jnp.square(unit_peak(out)), axis=-1).reshape(-1)
    else:
        raise ValueError(f"unknown SSM channel score {method!r}; one of {', '.join(CHANNEL_SCORES)}")
    return jax.vmap(descending, 1, 1)(scores.reshape(channels, heads))
