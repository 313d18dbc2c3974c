"""A dense weight with a low-rank update (LoRA, arXiv 2106.09685), laid out like every other leaf.

The elastic axis leads one of the two factors as it leads the weight, so a prefix of the pair is the pair of the prefix:
what is trained under masks is what a slice computes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

PRODUCT = "product"
"""The name by which a rematerialization policy knows results of these products."""


def product(x: Array, factor: Array) -> Array:
    """x @ factor in x's dtype."""
    # No wider result is asked for: sums are float32 on the device anyway, and the backward of a float32 result would
    # multiply in float32, at half the speed of 16-bit products or less.
    return jnp.matmul(x, factor.astype(x.dtype))


class MadeDense:
    """A weight that training makes dense for every product: `dense` and `shape` are all that it must have."""

    def lookup(self: Any, index: Int[Array, "*b"], dtype: DTypeLike) -> Float[Array, "*b h"]:
        """Entries of the leading axis, as an embedding's are looked up."""
        return self.dense(dtype)[index]

    def rows(self: Any, x: Float[Array, "*b h"]) -> Float[Array, "*b out"]:
        """weight @ x over the last dimension, the weight's leading ones flattened; in x's dtype."""
        return checkpoint_name(product(x, self._flat(x).T), PRODUCT)

    def columns(self: Any, flat: Float[Array, "*b k"]) -> Float[Array, "*b h"]:
        """x @ weight, x flattened like the weight's leading dimensions; in x's dtype."""
        return checkpoint_name(product(flat, self._flat(flat)), PRODUCT)

    def _flat(self: Any, x: Array) -> Array:
        # in x's dtype before the product, so that the gradient's product is in it, too
        return self.dense(x.dtype).reshape(-1, self.shape[-1])


@flax.struct.dataclass
class LoraArray(MadeDense):
    """base + scale * left @ right, the sum never formed while training.

    `base` is [*lead, h], `left` [*lead, rank], `right` [rank, h]; `scale` is alpha / rank. With a `key`, or one
    for each row of x, a part `dropout` of what the low-rank path receives is dropped, which part depends on the key,
    and the rest scaled up.
    """

    base: Any  # arrays as above; Any, since jax.tree.map and jax.eval_shape may put anything into a pytree
    left: Any
    right: Any
    key: Any = None
    scale: float = flax.struct.field(pytree_node=False, default=1.0)
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.base.shape

    def take_prefix(self, count: int) -> LoraArray:
        """The first `count` entries of the leading axis."""
        return dataclasses.replace(self, base=self.base[:count], left=self.left[:count])

    def dense(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
        """The weight with its update, computed in float32 and cast to `dtype`."""
        left, right = (jnp.asarray(factor, jnp.float32) for factor in (self.left, self.right))
        update = jnp.matmul(left, right, precision="highest")
        return (jnp.asarray(self.base, jnp.float32) + self.scale * update).astype(dtype)

    def dropped(self, x: Float[Array, "*b h"]) -> Float[Array, "*b h"]:
        """What the low-rank path receives of x."""
        if self.key is None or not self.dropout:
            return x
        share = 1.0 - self.dropout
        if self.key.ndim:
            kept = jax.vmap(lambda key, row: jax.random.bernoulli(key, share, row.shape))(self.key, x)
        else:
            kept = jax.random.bernoulli(self.key, share, x.shape)
        return jnp.where(kept, x / share, 0).astype(x.dtype)

    def rows(self, x: Float[Array, "*b h"]) -> Float[Array, "*b out"]:
        """weight @ x over the last dimension, the weight's leading ones flattened; in x's dtype."""
        left = self.left.reshape(-1, self.left.shape[-1])
        inner = self._scaled(product(self.dropped(x), self.right.T))
        return checkpoint_name(product(x, self._flat_base().T) + product(inner, left.T), PRODUCT)

    def columns(self, flat: Float[Array, "*b k"]) -> Float[Array, "*b h"]:
        """x @ weight, x flattened like the weight's leading dimensions; in x's dtype."""
        left = self.left.reshape(-1, self.left.shape[-1])
        inner = self._scaled(product(self.dropped(flat), left))
        return checkpoint_name(product(flat, self._flat_base()) + product(inner, self.right), PRODUCT)

    def _flat_base(self) -> Array:
        return self.base.reshape(-1, self.base.shape[-1])

    def _scaled(self, inner: Array) -> Array:
        # few numbers: scaling them is cheaper than scaling what they become
        return inner * jnp.asarray(self.scale, inner.dtype)
