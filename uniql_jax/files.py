"""Tensors on disk: safetensors shards read by prefix and written as a stream; JSON files."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from uniql_jax.errors import UserError
from uniql_jax.lazy_tensor import LazyTensor
from uniql_jax.outputs import check_space
from uniql_jax.partial import PartialFile

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    **{f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
    "BOOL": np.dtype(np.bool_),
}
UNREADABLE = np.dtype(np.void)
READERS = 4
"""Tensors read at a time: one thread does not fill a fast disk."""


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file in UTF-8, with or without a byte order mark.

    Raises:
        UserError: when it cannot be read, is not UTF-8 or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not readable JSON: it is not UTF-8 text") from None
    except RecursionError:
        raise UserError(f"{path} is not readable JSON: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON: {_line(error)[:200]}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or _line(error)}") from None


class ShardReader:
    """The tensors of a folder's safetensors file or shards; nothing but headers is read until `read`.

    `bytes_read` counts the tensor bytes handed out so far. Raises UserError for a folder without safetensors, a
    missing, truncated or damaged file, and a tensor that sits in two shards.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.bytes_read = 0
        self._home: dict[str, tuple[Path, int]] = {}  # tensor name -> file, and where in it the tensor begins
        self._names: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        self.files = _shard_paths(self.folder)
        self._partial: dict[Path, PartialFile] = {}
        for path in self.files:
            if (partial := PartialFile(path)).exists:
                self._partial[path] = partial
            for name, (kind, shape, start) in _header(path).items():
                if name in self._home:
                    other = self._home[name][0]
                    raise UserError(f"tensor {name!r} is stored twice, in {other.name} and in {path.name}")
                self._home[name] = path, start
                self._names[name] = (DTYPES.get(kind, UNREADABLE), shape)

    def names(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every tensor; the dtype is `UNREADABLE` for number formats that numpy lacks."""
        return dict(self._names)

    def span(self, name: str, rows: int | None = None) -> tuple[Path, tuple[int, int]]:
        """The file of a tensor, and where in it its first `rows` entries (all of them) begin and end."""
        (path, start), (dtype, shape) = self._home[name], self._names[name]
        count = math.prod(shape if rows is None else (min(rows, shape[0]), *shape[1:]))
        return path, (start, start + count * dtype.itemsize)

    def read(self, name: str, rows: int | None = None, start: int = 0) -> Shaped[np.ndarray, "..."]:
        """One tensor, or the entries from `start` to `rows` of its leading axis; only their bytes are read.

        Raises:
            KeyError: when there is no such tensor.
            UserError: when its number format cannot be read.
        """
        path, offset, dtype, shape = self._where(name, rows, start)
        value = _read(path, name, offset, dtype, shape)
        self.bytes_read += value.nbytes
        return value

    def lazy(self, name: str, rows: int | None = None) -> LazyTensor:
        """One tensor, or the first `rows` entries of its leading axis, of which nothing is read yet; else as `read`."""
        return LazyTensor(name, *self._where(name, rows, 0), self._count)

    def _count(self, size: int) -> None:
        self.bytes_read += size

    def _where(self, name: str, rows: int | None, start: int) -> tuple[Path, int, np.dtype, tuple[int, ...]]:
        """File, first byte, dtype and shape of what `read` reads."""
        (path, offset), (dtype, shape) = self._home[name], self._names[name]
        if dtype == UNREADABLE:
            raise UserError(f"cannot read tensor {name!r} of {self.folder}: numpy lacks its number format")
        if rows is not None:
            shape = (min(rows, shape[0]), *shape[1:])
        if start:
            shape = (max(shape[0] - start, 0), *shape[1:])
            offset += start * math.prod(shape[1:]) * dtype.itemsize
        partial = self._partial.get(path)
        if partial is not None and partial.missing([(offset, offset + math.prod(shape) * dtype.itemsize)]):
            raise UserError(f"{path} was downloaded for a higher prune rate only; load its hub id again, at this rate")
        return path, offset, dtype, shape


def _read(path: Path, name: str, start: int, dtype: np.dtype, shape: tuple[int, ...]) -> Shaped[np.ndarray, "..."]:
    """A tensor that begins at byte `start` of a file."""
    size = math.prod(shape) * dtype.itemsize
    try:
        # Not through a memory map: its pages would count as this process's memory.
        data = np.fromfile(path, np.uint8, size, offset=start)
    except OSError as error:
        raise UserError(f"cannot read tensor {name!r} of {path} ({error.strerror or _line(error)})") from None
    if len(data) < size:
        raise UserError(f"cannot read tensor {name!r} of {path}: the file has become shorter")
    return data.view(dtype).reshape(shape)


def load_tensors(path: Path, place: Callable[[np.ndarray], Any] = lambda value: value) -> dict[str, Any]:
    """All tensors of one safetensors file, several read at a time; other threads run on, unlike with the library.

    Each is what `place` makes of it, which the thread that read it calls: one is copied on while others are read.

    Raises:
        UserError: for a file that is missing or damaged, and a number format that numpy lacks.
    """
    header = _header(path)
    strange = [name for name, (kind, *_) in header.items() if kind not in DTYPES]
    if strange:
        raise UserError(f"cannot read tensor {strange[0]!r} of {path}: numpy lacks its number format")

    def placed(name: str, kind: str, shape: tuple[int, ...], start: int) -> Any:
        return place(_read(path, name, start, DTYPES[kind], shape))

    with ThreadPoolExecutor(READERS) as pool:
        coming = {name: pool.submit(placed, name, *where) for name, where in header.items()}
        return {name: value.result() for name, value in coming.items()}


def _shard_paths(folder: Path) -> list[Path]:
    """The weight files in the order of their names; like transformers, a single file wins over an index."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder} has no safetensors file")
        return files
    content = read_json(index)
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{index} is damaged: it maps no tensors to files")
    names = sorted(set(files.values()))
    for name in names:
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts or "\0" in name:
            raise UserError(f"{index} is damaged: it names {name!r}, which is not a file of its folder")
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks {name}, which its index names")
    return [folder / name for name in names]


def _header(path: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Tensor name -> (name of its number format, shape, where it begins in the file), as the library finds it valid."""
    try:
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or damaged ({_line(error)})") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or _line(error)}") from None
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


class ShardWriter:
    """Write tensors in the order they come, holding at most one shard's worth of them.

    A shard is written when the next tensor would take it over `max_shard_bytes`; a larger tensor gets its own.
    """

    def __init__(self, folder: str | os.PathLike[str], max_shard_bytes: int = 5 * 10**9) -> None:
        self.folder = Path(folder)
        self.max_shard_bytes = max_shard_bytes
        self.total_bytes = 0
        self._shards: list[Path] = []
        self._where: dict[str, int] = {}
        self._held: dict[str, np.ndarray] = {}
        self._held_bytes = 0

    def add(self, name: str, array: Shaped[np.ndarray, "..."]) -> None:
        """Take one tensor (any array numpy can read; it must not be changed before it is written).

        ValueError for a name that came before.
        """
        if name in self._where:
            raise ValueError(f"tensor {name!r} was added twice")
        value = np.asarray(array, order="C")
        if self._held and self._held_bytes + value.nbytes > self.max_shard_bytes:
            self._flush({})
        self._held[name] = value
        self._held_bytes += value.nbytes
        self.total_bytes += value.nbytes
        self._where[name] = len(self._shards)

    def finish(self, metadata: Mapping[str, str] | None = None) -> None:
        """Write what is held, give the shards their final names and write the index if there is more than one.

        `metadata` goes into the index, or into the header of a single file.
        """
        single = not self._shards
        self._flush(dict(metadata or {}) if single else {})
        if single:
            self._shards[0].rename(self.folder / WEIGHTS)
            return
        count = len(self._shards)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for path, name in zip(self._shards, names, strict=True):
            path.rename(self.folder / name)
        index = {
            "metadata": {"total_size": self.total_bytes, **(metadata or {})},
            "weight_map": {name: names[shard] for name, shard in self._where.items()},
        }
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self, metadata: dict[str, str]) -> None:
        path = self.folder / f"model-{len(self._shards) + 1:05d}.safetensors"
        check_space(path, self._held_bytes)
        # transformers refuses files whose header does not name a framework
        save_tensors(self._held, path, {"format": "pt", **metadata})
        self._shards.append(path)
        self._held, self._held_bytes = {}, 0


def save_tensors(tensors: Mapping[str, np.ndarray], path: Path, metadata: Mapping[str, str]) -> None:
    """Write one safetensors file with ordinary permissions; what the disk refuses is an OSError with its number."""
    path.touch()
    mode = path.stat().st_mode  # the library makes files that only their owner may read
    try:
        save_file(dict(tensors), path, metadata=dict(metadata))
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from None
    path.chmod(mode)
