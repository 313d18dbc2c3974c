"""Several devices of one machine: windows and rows are shared out among them, what there is one of is on each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Float

from uniql_jax.compression.compiling import jit

AXIS = "data"


class Devices:
    """The first `count` devices of this machine, or all. With one, nothing is moved anywhere.

    parked: batches stay in the host's memory, from where `fetch` brings them.
    """

    def __init__(self, count: int | None = 1, parked: bool = False):
        self.all = jax.local_devices()[:count]
        self.mesh = Mesh(np.asarray(self.all), (AXIS,)) if len(self.all) > 1 else None
        kinds = {memory.kind for memory in self.all[0].addressable_memories()}
        # A CPU's memory is the host's.
        self._parked = parked and self.all[0].platform != "cpu" and {"pinned_host", "device"} <= kinds

    def park(self, batch: Array | np.ndarray) -> Array:
        """The batch where batches are, its windows shared out."""
        place = self._place(batch, "pinned_host" if self._parked else None)
        return jnp.asarray(batch) if place is None else jax.device_put(batch, place)

    def fetch(self, batches: Any) -> Any:
        """A pytree of arrays [windows, ...], on the devices, their windows shared out."""
        kind = "device" if self._parked else None
        if self.mesh is None and kind is None:
            return batches
        return jax.tree.map(lambda batch: jax.device_put(batch, self._place(batch, kind)), batches)

    def everywhere(self, tree: Any) -> Any:
        """Arrays on every device."""
        return tree if self.mesh is None else jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def on(self, number: int, tree: Any) -> Any:
        """Arrays on one device; numbers beyond the last begin anew.

        What another thread than the main one computes with must be: two threads that have all devices work on one
        array may wait for each other.
        """
        return tree if self.mesh is None else jax.device_put(tree, self.all[number % len(self.all)])

    def by_rows(
        self, function: Callable[..., Any], rows: Float[Array, "rows width"], *others: Any, **settings: Any
    ) -> Any:
        """`function(rows, *others, **settings)`, jitted, whose results have a row for each: each device takes some."""
        if self.mesh is None:
            return function(rows, *others, **settings)
        count = len(rows)
        padded = jnp.pad(rows, ((0, -count % len(self.all)), (0, 0)))
        shared = _by_rows(function, self.mesh, len(others), tuple(sorted(settings.items())))
        found = self.everywhere(shared(*self.everywhere((padded, *others))))
        return jax.tree.map(lambda value: value[:count], found)

    def _place(self, batch: Any, kind: str | None) -> Sharding | None:
        if self.mesh is None:
            return None if kind is None else SingleDeviceSharding(self.all[0], memory_kind=kind)
        spec = PartitionSpec(AXIS) if len(batch) % len(self.all) == 0 else PartitionSpec()
        return NamedSharding(self.mesh, spec, memory_kind=kind)


@functools.cache
def _by_rows(function: Any, mesh: Mesh, others: int, settings: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """The jitted function with its first argument's rows shared out over the mesh; made once."""
    split, whole = PartitionSpec(AXIS), PartitionSpec()
    inner = functools.partial(function.__wrapped__, **dict(settings))
    specs = (split, *(whole for _ in range(others)))
    return jit(jax.shard_map(inner, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False))
