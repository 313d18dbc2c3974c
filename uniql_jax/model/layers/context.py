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


class Context(NamedTuple):
    """Positions of the tokens, who sees whom, which are real, where the cache goes on, and masks if any.

    positions [batch, length]; visible: `Causal`, or [batch, length, slots] of a cache; valid [batch, length]; slot:
    first cache slot to write; keep: kept sizes of this layer that mask instead of slicing.
    """

    positions: Int[Array, "b t"]
    visible: Causal | Bool[Array, "b t s"]
    valid: Bool[Array, "b t"]
    slot: Int[Array, ""] | int = 0
    keep: elastic.Keep | None = None


def full_context(valid: Bool[Array, "b t"], padded: bool = True) -> Context:
    """Whole sequences: a key is seen at or after its place, padding never; positions count real tokens from 0.

    `padded=False` promises that all of them are real.
    """
    positions = jnp.maximum(jnp.cumsum(valid.astype(jnp.int32), axis=1) - 1, 0)
    return Context(positions, Causal(valid if padded else None), valid)
