"""Wanda (Sun et al., arXiv 2306.11695) at 2:4: of every four inputs, an output keeps the two weights of the largest
|W_ij| |X_i|_2, |X_i|_2 = sqrt(sum_t x_ti^2). Weights that stay do not change. Layers one after another, each seen on
the stream of the pruned ones before it; embedding and head stay dense.

Evaluated: dense matrices with zeros. Counted: values that stay and their indices. At 4 bits GPTQ keeps the zeros.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
from jaxtyping import Array, Float

from benchmarks.baselines import semistructured
from benchmarks.baselines.dense import Calibration, Made


def prune(columns: Float[Array, "i o"], gram: Float[Array, "i i"]) -> Float[Array, "i o"]:
    """The weight with two of every four inputs of an output."""
    scores = jnp.abs(columns) * jnp.sqrt(jnp.diagonal(gram))[:, None]
    return jnp.where(semistructured.two_of_four(scores), columns, 0.0)


def rows(calibration: Calibration) -> Iterator[Made]:
    """The one model there is."""
    return semistructured.rows(calibration, prune)
