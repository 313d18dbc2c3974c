"""Calibration windows in batches, and their residual streams between layers: on disk, in memory, or computed again."""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Int

from uniql_jax.compression.artifacts import write_whole
from uniql_jax.compression.devices import AHEAD, Devices
from uniql_jax.compression.writer import Writer
from uniql_jax.transfer import to_host

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
Future = concurrent.futures.Future
Batch = Float[Array | np.ndarray, "_ t h"]
"""On its device, or where streams are parked NumPy's."""
Stream = Sequence[Batch]


class Windows:
    """Calibration windows in batches of a bounded number of tokens, whose results are summed or joined; no fewer than
    there are devices, if there are as many windows.

    `own`: those that this process works on, all unless others work as well; `tokens` counts those of all windows.
    """

    def __init__(self, tokens: Int[np.ndarray, "n t"], batch_tokens: int, devices: int = 1, own: range | None = None):
        self.tokens, self.count = tokens.size, len(tokens)
        self.own = range(len(tokens)) if own is None else own
        tokens = tokens[self.own.start : self.own.stop]
        size = max(1, min(batch_tokens // tokens.shape[1], -(-len(tokens) // devices)))
        self.batches = [jnp.asarray(tokens[i : i + size]) for i in range(0, len(tokens), size)]

    @property
    def ends(self) -> list[int]:
        """Where each batch ends among the windows of this process."""
        return np.cumsum([len(batch) for batch in self.batches]).tolist()


class StreamStore:
    """Residual streams (and their gradients) of all calibration windows between layers, one array [b, t, hidden] a
    batch.

    Every `interval`-th one is written to disk, where it outlives a kill. `hold` keeps others in memory while
    `held_bytes` last; what is nowhere is computed again. `mapped` and `summed` pass them through the devices.
    """

    def __init__(
        self,
        folder: Path,
        windows: Windows,
        interval: int = 1,
        dtype: str = "float32",
        writer: Writer | None = None,
        held_bytes: int = 0,
        devices: Devices | None = None,
    ):
        self.folder, self.windows, self.interval, self.dtype = folder, windows, interval, DTYPES[dtype]
        self._writer = writer
        self._room = held_bytes
        self.devices = devices or Devices()
        self._held: dict[tuple[str, int], Stream] = {}
        self._pending: dict[Path, Future[Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, name: str, index: int) -> Path:
        return self.folder / f"{name}_{index:05d}.npy"

    def has(self, name: str, index: int) -> bool:
        """Whether the stream is at hand."""
        path = self._path(name, index)
        here = (name, index) in self._held or path in self._pending or path.is_file()
        return self.devices.processes.all(here)  # what one process lacks, none has

    def save(self, name: str, index: int, value: Stream) -> bool:
        """Write the stream before layer `index` to disk if the interval says so; whether it is written."""
        path = self._path(name, index)
        if index % self.interval:
            return False
        if path not in self._pending and not path.is_file():
            if self._writer is None:
                self._write(path, list(value))
            else:
                self._pending[path] = self._writer.submit(self._write, path, list(value))
        return True

    def hold(self, name: str, index: int, value: Stream, *, always: bool = False) -> None:
        """Keep a stream in memory until it is dropped, if there is room, or `always`."""
        size = self._size(value)
        if (name, index) not in self._held and (always or size <= self._room):
            self._room -= size
            self._held[name, index] = list(value)

    def load(self, name: str, index: int) -> list[Batch]:
        """The stream in batches."""
        if (name, index) in self._held:
            return list(self._held[name, index])
        path = self._path(name, index)
        if path in self._pending:
            self._pending[path].result()
        parts = np.split(np.load(path, mmap_mode="r").view(self.dtype), self.windows.ends[:-1])
        with self.devices.copiers() as pool:
            return list(pool.map(self.devices.park, parts, range(len(parts))))

    def nearest(self, name: str, index: int) -> int | None:
        """The last index up to `index` whose stream is at hand."""
        return next((i for i in range(index, -1, -1) if self.has(name, i)), None)

    def mapped(self, function: Callable[..., Array], shared: Sequence[Any], *streams: Iterable[Any]) -> list[Any]:
        """`function(shared, *parts)` for the batches of streams, `shared` being what the batch's device has of it.

        A device gets its next batches while it computes one, no more than AHEAD of them.
        """
        done: list[Future[Any]] = []
        working: collections.deque[Array] = collections.deque()
        with self.devices.copiers() as pool:
            for number, parts in self._fetched(pool, streams):
                working.append(function(shared[number % len(self.devices)], *parts))
                done.append(pool.submit(self.devices.park, working[-1], number))
                if number >= len(self.devices):
                    jax.block_until_ready(working.popleft())
                if number >= AHEAD:
                    done[number - AHEAD].result()
            return [each.result() for each in done]

    def summed(self, function: Callable[..., Any], shared: Sequence[Any], *streams: Iterable[Any]) -> Any:
        """The sum of what `function(shared, *parts)` gives for the batches of streams: arrays, or pytrees of them; on
        the first device.
        """
        totals: dict[int, Any] = {}
        with self.devices.copiers() as pool:
            for number, parts in self._fetched(pool, streams):
                at = number % len(self.devices)
                found, before = function(shared[at], *parts), totals.get(at)
                totals[at] = found if before is None else jax.tree.map(jnp.add, before, found)
                jax.block_until_ready(before)
        return self.devices.total(list(totals.values()))

    def _fetched(
        self, pool: concurrent.futures.Executor, streams: Sequence[Iterable[Any]]
    ) -> Iterator[tuple[int, Sequence[Array]]]:
        """Every batch's number and parts on its device, where the next AHEAD are on their way meanwhile."""
        coming: collections.deque[tuple[int, Future[Any]]] = collections.deque()
        for number, parts in enumerate(zip(*streams, strict=True)):
            coming.append((number, pool.submit(self.devices.fetch, parts, number)))
            if len(coming) > AHEAD:
                first, fetched = coming.popleft()
                yield first, fetched.result()
        for number, fetched in coming:
            yield number, fetched.result()

    def sample(self, stream: Iterable[Any], tokens: int) -> Array:
        """About so many tokens of a stream, or of the batches themselves, in windows spread evenly; on the first
        device.
        """
        count, length = self.windows.ends[-1], self.windows.batches[0].shape[1]
        wanted = np.arange(0, count, max(1, count * length // max(tokens, length)))
        first, found = 0, []
        for number, batch in enumerate(stream):
            own = wanted[(wanted >= first) & (wanted < first + len(batch))] - first
            if len(own):
                found.append(self.devices.on(0, self.devices.fetch(batch, number)[own]))
            first += len(batch)
        return jnp.concatenate(found)

    def release(self, name: str, index: int) -> None:
        """Forget what memory holds of a stream; a file of it stays."""
        self._room += self._size(self._held.pop((name, index), ()))

    def _size(self, value: Stream) -> int:
        return sum(part.size for part in value) * self.dtype.itemsize

    def drop(self, name: str, indices: Sequence[int]) -> None:
        """Forget streams, where they are there; files go once all that was handed to the writer before is written."""
        for index in indices:
            self.release(name, index)
            path = self._path(name, index)
            if self._pending.pop(path, None) is None and not path.is_file():
                continue
            if self._writer is None:
                path.unlink()
            else:
                self._writer.submit(path.unlink, True)

    def _write(self, path: Path, value: Stream) -> None:
        shape = (sum(len(part) for part in value), *value[0].shape[1:])
        bits = np.dtype(f"u{self.dtype.itemsize}")  # numpy's files know no bfloat16

        def fill(temporary: Path) -> None:
            with temporary.open("wb") as file:
                header = {"descr": np.lib.format.dtype_to_descr(bits), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for part in value:
                    file.write(np.asarray(to_host(part), self.dtype).view(bits).data)

        write_whole(path, fill)
