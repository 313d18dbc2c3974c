"""What every weight can do, however it is held; and the one adapter that makes a plain array such a weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


@runtime_checkable
class Weight(Protocol):
    """A matrix of logical shape [*lead, h], sorted along its leading axis."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        ...

    def take_prefix(self, count: int) -> Weight:
        """The first `count` entries of the leading axis."""
        ...

    def rows(self, x: Float[Array, "*b h"]) -> Float[Array, "*b out"]:
        """weight @ x over the last dimension, the weight's leading ones flattened; in x's dtype or float32."""
        ...

    def columns(self, flat: Float[Array, "*b k"]) -> Float[Array, "*b h"]:
        """x @ weight, x flattened like the weight's leading dimensions; in x's dtype or float32."""
        ...

    def dense(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
        """The weight as a plain array of its logical shape."""
        ...

    def lookup(self, index: Int[Array, "*b"], dtype: DTypeLike) -> Float[Array, "*b h"]:
        """Entries of the leading axis, as an embedding's are looked up."""
        ...


class StoredWeight(Weight, Protocol):
    """A weight that a checkpoint can hold."""

    def tensors(self, name: str) -> Mapping[str, np.ndarray]:
        """What is stored of it, by tensor name."""
        ...


@dataclasses.dataclass(frozen=True)
class DenseArray:
    """A plain array as a Weight; made where one is applied, never part of a model's tree."""

    value: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.value.shape

    def take_prefix(self, count: int) -> DenseArray:
        """The first `count` entries of the leading axis."""
        return DenseArray(self.value[:count])

    def rows(self, x: Float[Array, "*b h"]) -> Float[Array, "*b out"]:
        """weight @ x over the last dimension, the weight's leading ones flattened; float32."""
        flat = self.value.reshape(-1, self.shape[-1])
        return jnp.matmul(x, flat.T.astype(x.dtype), preferred_element_type=jnp.float32)

    def columns(self, flat: Float[Array, "*b k"]) -> Float[Array, "*b h"]:
        """x @ weight, x flattened like the weight's leading dimensions; float32."""
        own = self.value.reshape(-1, self.shape[-1]).astype(flat.dtype)
        return jnp.matmul(flat, own, preferred_element_type=jnp.float32)

    def dense(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
        """The array in `dtype`."""
        return jnp.asarray(self.value, dtype)

    def lookup(self, index: Int[Array, "*b"], dtype: DTypeLike) -> Float[Array, "*b h"]:
        """Entries of the leading axis, as an embedding's are looked up."""
        return jnp.take(self.value, index, axis=0).astype(dtype)

    def tensors(self, name: str) -> Mapping[str, np.ndarray]:
        """What is stored of it, by tensor name."""
        return {name: np.asarray(self.value)}


def as_weight(value: Any) -> Weight:
    """A weight as it is; a plain array as a DenseArray."""
    return value if hasattr(value, "take_prefix") else DenseArray(value)


def as_stored(value: Any) -> StoredWeight:
    """`as_weight` for what is written to a checkpoint."""
    return value if hasattr(value, "take_prefix") else DenseArray(value)


def dense(value: Any, dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
    """A weight as a plain array, whichever way it is held."""
    return as_weight(value).dense(dtype)
