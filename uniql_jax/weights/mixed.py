"""A weight whose first entries have all 4 bits, in words as kernels read them, and whose others have 3.

What a nested weight becomes on a device: nothing of it is held twice, and nothing is expanded.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels.dequant_matmul.three_bit import BITS
from uniql_jax.weights.nested import NestedArray, from_tiles
from uniql_jax.weights.quantized import QuantizedArray


@flax.struct.dataclass
class MixedArray:
    """The entries of `whole`, then those of `rest`, along the leading axis."""

    whole: Any  # QuantizedArray of 4 bits, and one of 3 or else a NestedArray of no last bits
    rest: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape of the weight."""
        return (self.whole.shape[0] + self.rest.shape[0], *self.rest.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.whole.nbytes + self.rest.nbytes

    def take_prefix(self, count: int) -> QuantizedArray | MixedArray:
        """The first `count` entries of the leading axis. Raises ValueError when the cut would split a group."""
        if count <= self.whole.shape[0]:
            return self.whole.take_prefix(count)
        return dataclasses.replace(self, rest=self.rest.take_prefix(count - self.whole.shape[0]))

    def dense(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
        """The weight as a plain array of its logical shape."""
        return jnp.concatenate([self.whole.dense(dtype), self.rest.dense(dtype)])

    def rows(self, x: Float[Array, "*b h"]) -> Float[Array, "*b out"]:
        """weight @ x over the last dimension, the weight's leading ones flattened."""
        return jnp.concatenate([part.rows(x).astype(jnp.float32) for part in (self.whole, self.rest)], axis=-1)

    def columns(self, flat: Float[Array, "*b k"]) -> Float[Array, "*b h"]:
        """x @ weight, x flattened like the weight's leading dimensions."""
        border = math.prod(self.whole.shape[:-1])
        first = self.whole.columns(flat[..., :border]).astype(jnp.float32)
        return first + self.rest.columns(flat[..., border:]).astype(jnp.float32)

    def lookup(self, index: Int[Array, "*b"], dtype: DTypeLike) -> Float[Array, "*b h"]:
        """Entries of the leading axis, as an embedding's are looked up; contract "last" only."""
        border = self.whole.shape[0]
        first = self.whole.lookup(jnp.minimum(index, border - 1), dtype)
        return jnp.where((index < border)[..., None], first, self.rest.lookup(jnp.maximum(index - border, 0), dtype))


def in_parts(weight: NestedArray, tiles: bool = False) -> QuantizedArray | NestedArray | MixedArray:
    """A nested weight of numpy arrays in the form that computes: words where there are all bits, planes elsewhere, or
    tiles of 3 bits.
    """
    full = weight.full
    if full == weight.shape[0]:
        return weight.packed()
    rest = weight.drop_prefix(full) if full else weight
    rest = rest.tiled() if tiles else rest
    return MixedArray(weight.take_prefix(full).packed(), rest) if full else rest


def in_planes(value: QuantizedArray | NestedArray | MixedArray) -> QuantizedArray | NestedArray | MixedArray:
    """The same weight as `in_parts` gives it without tiles, whatever a device made of it: arrays of numpy."""
    if isinstance(value, MixedArray):
        return MixedArray(in_planes(value.whole), in_planes(value.rest))
    if isinstance(value, QuantizedArray):
        value = from_tiles(value) if value.bits == BITS else value.in_layout("plain")
    return jax.tree.map(np.asarray, value)
