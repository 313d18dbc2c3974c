"""What a block must know about the tokens in addition to the residual stream."""

from __future__ import annotations

from typing import NamedTuple

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from uniql_jax import elastic


@flax.struct.dataclass
class Causal:
    """Each token sees itself and the real ones of these very tokens before it; padding sees nothing.

    `valid` [batch, length] is false on padding; None: there is none, and code is compiled for that.
    """

    valid: Bool[Array, "b t"] | None = None


@flax.struct.dataclass
class Cached:
    """Each token sees itself and what the cache holds of its sequence before it: the slots from `start` on.

    `start` is [batch]; None: 0 for all, and code is compiled for that.
    """

    start: Int[Array, " b"] | None = None


class Context(NamedTuple):
    """Positions of the tokens, who sees whom, which are real, where the cache goes on, and masks if any.

    positions [batch, length]; visible: these tokens alone, or a cache that holds them; valid [batch, length]; slot:
    first cache slot to write; keep: kept sizes of this layer that mask instead of slicing; count: how many of the
    tokens there are, padding follows them; None: all.
    """

    positions: Int[Array, "b t"]
    visible: Causal | Cached
    valid: Bool[Array, "b t"]
    slot: Int[Array, ""] | int = 0
    keep: elastic.Keep | None = None
    count: Int[Array, ""] | int | None = None


def full_context(valid: Bool[Array, "b t"], padded: bool = True) -> Context:
    """Whole sequences: a key is seen at or after its place, padding never; positions count real tokens from 0.

    `padded=False` promises that all of them are real.
    """
    positions = jnp.maximum(jnp.cumsum(valid.astype(jnp.int32), axis=1) - 1, 0)
    return Context(positions, Causal(valid if padded else None), valid)
