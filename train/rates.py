"""Which prune rate a training step sees: one for the whole model, drawn from (seed, step) alone."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from uniql_jax import elastic
from uniql_jax.plan import MAX_PRUNE_RATE, Plan
from uniql_jax.train.settings import FALL as FALL
from uniql_jax.train.settings import NUMBER, split_distribution
from uniql_jax.train.settings import distribution as distribution

RATES = tuple(round(0.05 * i, 2) for i in range(round(MAX_PRUNE_RATE / 0.05) + 1))
"""0 to 0.35 by 0.05."""


def probabilities(distribution: str) -> Float[np.ndarray, " rates"]:
    """Probability of each of RATES: all alike; or proportional to exp(-FALL rank), the most pruned first (UniQL; its
    fall is 0.1, "low-kept-first:0.3" makes it 0.3); or "sandwich", a third of the steps at the highest rate and a sixth
    at rate 0, since what lies between gains from both (Yu & Huang, arXiv 1903.05134).

    Raises ValueError for an unknown distribution.
    """
    name, fall = split_distribution(distribution)
    weight = np.ones(len(RATES))
    if name == "sandwich":
        weight[0], weight[-1] = 2.0, 4.0
    elif name == "low-kept-first":
        weight = np.exp(-fall * np.arange(len(RATES)))[::-1]
    return weight / weight.sum()


def draw(distribution: str, seed: int, step: int) -> float:
    """The prune rate of a step; where `distribution` is a number, that rate at every step.

    Raises ValueError for an unknown distribution.
    """
    if re.fullmatch(NUMBER, distribution):
        return float(distribution)
    rng = np.random.default_rng([seed, step])
    return float(rng.choice(RATES, p=probabilities(distribution)))


def keep_arrays(plan: Plan, rate: float) -> tuple[elastic.Keep, ...]:
    """Kept sizes of every layer at a rate as int32 scalars: arguments of one program that serves all rates."""
    return tuple({axis: jnp.int32(count) for axis, count in layer.items()} for layer in plan.keep(rate))
