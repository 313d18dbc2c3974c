"""A dense weight with an update of its own shape: full fine-tuning, for models so small that an optimizer can
hold something of every weight.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from uniql_jax.weights.lora import MadeDense


@flax.struct.dataclass
class DeltaArray(MadeDense):
    """base + scale * change, both [*lead, h]; laid out like every other leaf, so a prefix of it is a prefix of both.

    `scale` is about the size of a weight, so that a learning rate says which part of it one step may change.
    """

    base: Any  # arrays as above; Any, since jax.tree.map and jax.eval_shape may put anything into a pytree
    change: Any
    scale: float = flax.struct.field(pytree_node=False, default=1.0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.base.shape

    def take_prefix(self, count: int) -> DeltaArray:
        """The first `count` entries of the leading axis."""
        return dataclasses.replace(self, base=self.base[:count], change=self.change[:count])

    def dense(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
        """The weight with its update, computed in float32 and cast to `dtype`."""
        changed = jnp.asarray(self.base, jnp.float32) + self.scale * jnp.asarray(self.change, jnp.float32)
        return changed.astype(dtype)
