"""What a block must know about the tokens besides the stream itself."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from uniql_jax import elastic


class Context(NamedTuple):
    """Positions of the tokens, who sees whom, which are real, where the cache goes on, and masks if any.

    positions [batch, length]; visible [batch, length, slots]; valid [batch, length]; slot: first cache slot to write;
    keep: kept sizes of this layer that mask instead of slicing.
    """

    positions: Int[Array, "b t"]
    visible: Bool[Array, "b t s"]
    valid: Bool[Array, "b t"]
    slot: Int[Array, ""] | int = 0
    keep: elastic.Keep | None = None


def full_context(valid: Bool[Array, "b t"]) -> Context:
    """Whole sequences: a key is seen at or after its place, padding never; positions count real tokens from 0."""
    length = valid.shape[1]
    visible = jnp.tril(jnp.ones((length, length), bool))[None] & valid[:, None, :]
    return Context(jnp.maximum(jnp.cumsum(valid.astype(jnp.int32), axis=1) - 1, 0), visible, valid)
