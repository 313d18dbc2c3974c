"""Order of MLP channels from the Gram matrix of what down_proj receives (UniQL section 3; method: MLP)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.compression.math.order import descending, greedy, unit_peak
from uniql_jax.compression.settings import MLP_SCORES


def leverage(gram: Float[Array, "i i"], ridge: float = 1e-2) -> Float[Array, " i"]:
    """Ridge leverage scores diag(C (C + lambda I)^-1), the score of UniQL (section 3).

    From one Cholesky factorization: 1 - lambda * ||column of L^-1||^2. A Gram matrix of zeros scores zero.

    Args:
        gram: Gram matrix C, float32.
        ridge: lambda as a part of the mean of C's diagonal.

    Returns:
        A score in [0, 1] for every channel.
    """
    gram = unit_peak(gram)
    mean = jnp.mean(jnp.diagonal(gram))
    amount = ridge * jnp.where(mean > 0, mean, 1.0)
    factor = jnp.linalg.cholesky(gram + amount * jnp.eye(gram.shape[0], dtype=gram.dtype))
    inverse = jax.scipy.linalg.solve_triangular(factor, jnp.eye(gram.shape[0], dtype=gram.dtype), lower=True)
    return 1 - amount * jnp.sum(inverse * inverse, axis=0)


def order_channels(
    gram: Float[Array, "i i"],
    down: Float[Array, "i h"],
    method: str = "greedy",
    seed: Int[Array, ""] | int = 0,
    metric: Float[Array, "h h"] | None = None,
    gate_fisher: Float[Array, "i i"] | None = None,
) -> Int[Array, " i"]:
    """Channel indices, most important first.

    greedy counts how dropped channels add up: loss = C * (W metric W^T) elementwise; fisher does with gate_fisher,
    fisher_diagonal takes its diagonal alone. energy is C_jj, energy_weight C_jj ||W_j||^2, leverage the score of UniQL
    (section 3); magnitude and random are baselines.

    Args:
        gram: mean outer product of down's inputs, float32.
        down: its weight, channel first.
        method: one of `settings.MLP_SCORES`.
        seed: of the random order.
        metric: Gram of the loss gradient at the block's output; None weighs all outputs alike.
        gate_fisher: Gram of the loss gradient with respect to a gate on every channel.

    Returns:
        A permutation of the channels, int32.

    Raises:
        ValueError: an unknown method, or one whose matrix is missing.
    """
    gram, down = unit_peak(gram), unit_peak(down)
    metric = None if metric is None else unit_peak(metric)
    energy = jnp.diagonal(gram)
    if method == "greedy":
        return greedy(gram * ((down if metric is None else down @ metric) @ down.T))
    if method == "fisher" and gate_fisher is not None:
        return greedy(gate_fisher)
    if method == "fisher_diagonal" and gate_fisher is not None:
        return descending(jnp.diagonal(gate_fisher))
    if method == "energy":
        return descending(energy)
    if method == "energy_weight":
        return descending(energy * jnp.sum(down * down, axis=1))
    if method == "leverage":
        return descending(leverage(gram))
    if method == "magnitude":
        return descending(jnp.sum(down * down, axis=1))
    if method == "random":
        return jax.random.permutation(jax.random.key(seed), gram.shape[0])
    raise ValueError(f"unknown MLP score {method!r}; one of {', '.join(MLP_SCORES)}")
