"""Several devices of one machine: batches and rows are shared out among them, what there is one of is copied to each.
Where several processes work together, so are theirs (processes.py).

Every program runs on one device. Nothing is partitioned, so no device ever waits for another in the middle of a
program, and threads may work on the same devices at the same time.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from uniql_jax.compression.processes import Processes
from uniql_jax.transfer import to_host

AHEAD = 4
"""Batches on their way between the host's memory and a device, in each direction, while another is worked on."""


class Devices:
    """The first `count` devices of this machine, or all. With one, nothing is moved anywhere.

    Batch number i is worked on by device i, numbers beyond the last begin anew. parked: batches stay in the host's
    memory as NumPy arrays, from where `fetch` brings them: pinned memory has a pool that grows by doubling, and a run
    with that pool bounded did not give the bytes of a run without.
    processes: who else works on the pass; sums and rows go over all of them.
    """

    def __init__(self, count: int | None = 1, parked: bool = False, processes: Processes | None = None):
        self.all = jax.local_devices()[:count]
        self.processes = processes or Processes()
        self.parked = parked

    def __len__(self) -> int:
        return len(self.all)

    def park(self, batch: Array | np.ndarray, number: int) -> Array | np.ndarray:
        """Batch `number` where batches are kept."""
        if self.parked:
            return to_host(batch) if isinstance(batch, jax.Array) else np.array(batch)  # of a file: read now
        return self.on(number, jnp.asarray(batch))

    def fetch(self, parts: Any, number: int) -> Any:
        """A pytree of arrays on the device that works on batch `number`."""
        return jax.device_put(parts, self._device(number)) if self.parked else self.on(number, parts)

    def copiers(self) -> concurrent.futures.Executor:
        """What runs `park` and `fetch`: where batches are parked, threads, since one copies slower than a GPU works."""
        return concurrent.futures.ThreadPoolExecutor(2 * AHEAD) if self.parked else _Immediate()

    def on(self, number: int, tree: Any) -> Any:
        """Arrays on one device."""
        return tree if len(self) == 1 else jax.device_put(tree, self._device(number))

    def everywhere(self, tree: Any) -> list[Any]:
        """A copy of the arrays for each device."""
        return [self.on(number, tree) for number in range(len(self))]

    def total(self, trees: Sequence[Any], number: int = 0) -> Any:
        """The sum of pytrees of arrays that lie on different devices, of all processes, on one."""
        first, *rest = (self.on(number, tree) for tree in trees)
        for tree in rest:
            first = jax.tree.map(jnp.add, first, tree)
        return first if self.processes.count == 1 else self.on(number, self.processes.total(self.on(0, first)))

    def by_rows(
        self, function: Callable[..., Any], rows: Float[Array, "rows width"], *others: Any, **settings: Any
    ) -> Any:
        """`function(rows, *others, **settings)`, whose results have a row for each: each device takes some."""
        many, count = self.processes.count, len(rows)
        if many == 1:
            return self._by_rows(function, rows, *others, **settings)
        each = -(-count // many)
        own = jnp.pad(rows, ((0, each * many - count), (0, 0)))[each * self.processes.index :][:each]
        found = self.processes.joined(self._by_rows(function, own, *others, **settings))
        return jax.tree.map(lambda value: value[:count], found)

    def _by_rows(self, function: Callable[..., Any], rows: Array, *others: Any, **settings: Any) -> Any:
        if len(self) == 1:
            return function(rows, *others, **settings)
        count, each = len(rows), -(-len(rows) // len(self))
        padded = jnp.pad(rows, ((0, each * len(self) - count), (0, 0)))
        parts = [padded[start : start + each] for start in range(0, len(padded), each)]
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]  a thread's own

        def work(number: int, part: Array) -> Any:
            with jax.default_matmul_precision(precision):
                return function(*self.on(number, (part, *others)), **settings)

        # A program's loops are followed by the thread that started it: one thread would have the devices take turns.
        with concurrent.futures.ThreadPoolExecutor(len(self)) as pool:
            found = list(pool.map(work, range(len(parts)), parts))
        return jax.tree.map(lambda *values: jnp.concatenate(self.on(0, values))[:count], *found)

    def _device(self, number: int) -> jax.Device:
        return self.all[number % len(self.all)]


class _Immediate(concurrent.futures.Executor):
    """Calls what it is given at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        """The result of a call, which is over."""
        done: concurrent.futures.Future[Any] = concurrent.futures.Future()
        done.set_result(fn(*args, **kwargs))
        return done
