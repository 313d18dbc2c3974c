"""Weights that lie on several devices: as a model holds them, and as a program on one device sees its part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from uniql_jax import elastic
from uniql_jax.weights.parts import part_of
from uniql_jax.weights.protocol import as_weight
from uniql_jax.weights.quantized import QuantizedArray
from uniql_jax.weights.split import AXIS, Split, split_dim


@flax.struct.dataclass
class Shard:
    """A leaf whose parts lie on the devices of a mesh.

    `parts` is one part's array or packed weight with an axis more in front, which counts devices; `shape` is the
    logical shape of the whole leaf.
    """

    parts: Any
    split: Split = flax.struct.field(pytree_node=False)
    dim: str = flax.struct.field(pytree_node=False)
    contract: str | None = flax.struct.field(pytree_node=False)
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)

    def take_prefix(self, count: int) -> Shard:
        """The first `count` entries of the leading axis, each device's own among them; nothing moves."""
        shape = (count, *self.shape[1:])
        if self.dim != "ffn":
            return dataclasses.replace(self, parts=_prefix(self.parts, count), shape=shape)
        index = np.stack([self.split.index("ffn", device, count) for device in range(self.split.count)])
        parts = _prefix(self.parts, index.shape[1])
        return dataclasses.replace(self, parts=_without(parts, index < 0), shape=shape)

    def local(self) -> Any:
        """The part of the device that asks, inside a program that runs on every device (`jax.shard_map`)."""
        part = jax.tree.map(lambda value: value[0], self.parts)
        if self.dim == "vocab":
            return VocabularyPart(part, self.shape)
        return Summed(part) if self.contract == "first" else part


def is_shard(value: Any) -> bool:
    """Whether a leaf of a pytree is a Shard; for `jax.tree` functions, which would else look inside."""
    return isinstance(value, Shard)


def _prefix(parts: Any, count: int) -> Any:
    return jax.vmap(lambda part: part.take_prefix(count) if hasattr(part, "take_prefix") else part[:count])(parts)


def _without(parts: Any, unused: np.ndarray) -> Any:
    """Parts with zeros in place of these entries of the leading axis, bool [devices, entries]."""
    if not unused.any():
        return parts
    if not isinstance(parts, QuantizedArray):
        return jnp.where(unused.reshape(unused.shape + (1,) * (parts.ndim - 2)), jnp.zeros((), parts.dtype), parts)
    if parts.contract == "first":
        unused = unused[:, :: parts.group]
    gone = unused.reshape(unused.shape + (1,) * (parts.scale.ndim - 2))
    return dataclasses.replace(parts, scale=jnp.where(gone, jnp.zeros((), parts.scale.dtype), parts.scale))


class _Part:
    """A part of a weight, on one device, in the middle of a program."""

    def __init__(self, part: Any):
        self.part = part

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape of the part."""
        return self.part.shape

    def take_prefix(self, count: int) -> Any:
        """Parts are cut before a program begins."""
        raise NotImplementedError

    def dense(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
        """The part as a plain array."""
        return as_weight(self.part).dense(dtype)

    def rows(self, x: Float[Array, "*b h"]) -> Float[Array, "*b out"]:
        """weight @ x over the last dimension, the weight's leading ones flattened."""
        return as_weight(self.part).rows(x)

    def columns(self, flat: Float[Array, "*b k"]) -> Float[Array, "*b h"]:
        """x @ weight, x flattened like the weight's leading dimensions."""
        return as_weight(self.part).columns(flat)

    def lookup(self, index: Int[Array, "*b"], dtype: DTypeLike) -> Float[Array, "*b h"]:
        """Entries of the leading axis."""
        return as_weight(self.part).lookup(index, dtype)


class Summed(_Part):
    """A part of what is contracted: products are summed over the devices, the one place where a block waits."""

    def columns(self, flat: Float[Array, "*b k"]) -> Float[Array, "*b h"]:
        """x @ weight, of all devices together; float32."""
        return jax.lax.psum(super().columns(flat).astype(jnp.float32), AXIS)


class VocabularyPart(_Part):
    """Some rows of an embedding or a head; results are those of all rows."""

    def __init__(self, part: Any, shape: tuple[int, ...]):
        super().__init__(part)
        self._shape = shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape of the whole table."""
        return self._shape

    def rows(self, x: Float[Array, "*b h"]) -> Float[Array, "*b out"]:
        """weight @ x of all rows."""
        found = jax.lax.all_gather(super().rows(x), AXIS, axis=x.ndim - 1, tiled=True)
        return found[..., : self._shape[0]]

    def lookup(self, index: Int[Array, "*b"], dtype: DTypeLike) -> Float[Array, "*b h"]:
        """Entries of the leading axis, from the device that has them."""
        count = self.part.shape[0]
        place = index - count * jax.lax.axis_index(AXIS)
        own = (place >= 0) & (place < count)
        found = super().lookup(jnp.where(own, place, 0), dtype)
        return jax.lax.psum(jnp.where(own[..., None], found, jnp.zeros((), dtype)), AXIS)


def total_of_neighbors(value: Float[Array, "..."], axis: str, count: int) -> Float[Array, "..."]:
    """The sum over the `count` devices next to one another that share something."""
    everything = jax.lax.all_gather(value, axis)
    first = jax.lax.axis_index(axis) // count * count
    return jax.lax.dynamic_slice_in_dim(everything, first, count, 0).sum(0)


def spread(leaf: elastic.Leaf, value: Any, split: Split, prepare: Callable[[Any], Any]) -> Any:
    """Put a leaf on the devices of a mesh, each part on its own; the host holds one part at a time.

    Args:
        leaf: the row of `elastic.BLOCKS` or `elastic.TOP` that describes it.
        value: what is kept of it, as `part_of` takes it.
        split: who has what.
        prepare: brings a part into the form in which devices hold it.

    Returns:
        A Shard; the leaf on every device where it is not shared out.
    """
    dim = split_dim(leaf)
    if dim is None:
        return jax.device_put(prepare(part_of(leaf, value, split, 0)), split.replicated)
    assert isinstance(split.mesh, Mesh), "parts lie on devices"
    shape = tuple(value.shape)
    here = {
        device: i
        for i, device in enumerate(np.asarray(split.mesh.devices).flat)
        if device.process_index == jax.process_index()
    }
    placed = [
        jax.tree.map(lambda array, device=device: jax.device_put(array[None], device), part)
        for device, i in here.items()
        for part in [prepare(part_of(leaf, value, split, i))]
    ]

    def joined(*arrays: Array) -> Array:
        whole = (split.count, *arrays[0].shape[1:])
        return jax.make_array_from_single_device_arrays(whole, split.stacked, list(arrays))

    return Shard(jax.tree.map(joined, *placed), split, dim, leaf.contract, shape)
