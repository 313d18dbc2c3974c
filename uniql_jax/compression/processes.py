"""Several processes, on one host or many, that work on one pass: each has windows of its own, sums go over all.

All run the same stages in the same order. They meet only where something is summed, shared out or agreed on, always in
the main thread, and each keeps what is done in a work folder of its own.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  numpy knows bfloat16 by name once it is imported
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from uniql_jax.errors import UserError

AXIS = "process"
LOST = "another process of this run has ended; start all of them again, with --resume"
_WORD = 2**31


class Processes:
    """What the processes of this run do together; with one, everything is as it was."""

    def __init__(self) -> None:
        several = jax.distributed.is_initialized()
        self.count = jax.process_count() if several else 1
        self.index = jax.process_index() if several else 0

    @functools.cached_property
    def _mesh(self) -> Mesh:
        first = {device.process_index: device for device in reversed(jax.devices())}
        return Mesh(np.asarray([first[i] for i in range(self.count)]), (AXIS,))

    def share(self, count: int) -> range:
        """Which of `count` things this process takes: a run of them, as even as can be."""
        return range(count * self.index // self.count, count * (self.index + 1) // self.count)

    def total(self, tree: Any) -> Any:
        """The sum over processes of pytrees of arrays of one shape, on the first device."""
        return tree if self.count == 1 else self._together(tree, _summed)

    def joined(self, tree: Any) -> Any:
        """The arrays of all processes, of one shape, one after another along the first axis."""
        return tree if self.count == 1 else self._together(tree, _joined)

    def all(self, flag: bool) -> bool:
        """Whether something is so in every process."""
        return flag if self.count == 1 else int(self.total(jnp.int32(flag))) == self.count

    def first(self, flag: bool) -> bool:
        """What process 0 says."""
        return flag if self.count == 1 else bool(self.total(jnp.int32(flag and self.index == 0)))

    def given(
        self, owner: int, tensors: Mapping[str, Any] | None, record: Any
    ) -> tuple[Mapping[str, Shaped[np.ndarray, "..."]], Any]:
        """Tensors and plain data of the process `owner`, in every process; others pass None."""
        if self.count == 1:
            assert tensors is not None
            return tensors, record
        found = np.zeros(0, np.uint8)
        if self.index == owner:
            assert tensors is not None
            found = np.frombuffer(_to_bytes(tensors, record), np.uint8)
        high, low = (int(part) for part in self.total(jnp.asarray(divmod(found.size, _WORD), jnp.int32)))
        found = self.total(found if found.size else np.zeros(high * _WORD + low, np.uint8))
        return _from_bytes(np.asarray(found))

    def _together(self, tree: Any, function: Callable[[Any], Any]) -> Any:
        place, everywhere = (NamedSharding(self._mesh, spec) for spec in (PartitionSpec(AXIS), PartitionSpec()))
        own = self._mesh.devices[self.index]

        def whole(value: Any) -> Array:
            part = jax.device_put(jnp.asarray(value)[None], own)
            return jax.make_array_from_single_device_arrays((self.count, *part.shape[1:]), place, [part])

        try:
            found = jax.jit(function, out_shardings=everywhere)(jax.tree.map(whole, tree))
            return jax.tree.map(lambda value: value.addressable_data(0), jax.block_until_ready(found))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise
            raise UserError(LOST) from None


def _summed(tree: Any) -> Any:
    return jax.tree.map(lambda value: value.sum(0, dtype=value.dtype), tree)


def _joined(tree: Any) -> Any:
    return jax.tree.map(lambda value: value.reshape(-1, *value.shape[2:]), tree)


def _to_bytes(tensors: Mapping[str, Any], record: Any) -> bytes:
    """Tensors, bfloat16 ones among them, and plain data: the length of a header, the header, the numbers."""
    arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    header = json.dumps([record, {name: [value.dtype.name, value.shape] for name, value in arrays.items()}]).encode()
    return b"".join([len(header).to_bytes(8, "little"), header, *(value.tobytes() for value in arrays.values())])


def _from_bytes(data: Shaped[np.ndarray, " n"]) -> tuple[dict[str, Shaped[np.ndarray, "..."]], Any]:
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    record, shapes = json.loads(data[8:start].tobytes())
    found = {}
    for name, (kind, shape) in shapes.items():
        dtype = np.dtype(kind)
        end = start + math.prod(shape) * dtype.itemsize
        found[name] = data[start:end].copy().view(dtype).reshape(shape)
        start = end
    return found, record
