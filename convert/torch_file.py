"""Files of torch.save, read without torch and without trust.

Such a file is a zip archive: a pickle (data.pkl) that names tensors and other objects, and one stored entry of raw
bytes per tensor. A pickle is a program that may call anything, so its instructions are followed with every class and
function replaced by a record that only keeps what it is given; nothing is imported and nothing of the file is called.
"""

from __future__ import annotations

import dataclasses
import io
import math
import mmap
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from uniql_jax.errors import UserError

_STORAGES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_OLD_FORMAT = bytes.fromhex("8a0a6cfc9c46f9206aa85019")  # the number that torch wrote first before it wrote zip files
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field
_PICKLE_ERRORS = (
    pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RecursionError,
    TypeError, ValueError, struct.error,
)  # fmt: skip


class Record:
    """Stands for any object of the file: where its class is said to come from, and what it was made with."""

    module = ""
    name = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Record:
        record = object.__new__(cls)
        record.args, record.state = args, None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def _ignore(self, *_: Any) -> None:
        """Items of containers that we do not know."""

    append = extend = add = __setitem__ = _ignore


class _Dict(dict[Any, Any]):
    """Stands for an OrderedDict; the attributes that torch gives one are dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Storage(Record):
    """The bytes of one or more tensors; args are its torch type and the name of its entry, both text."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of the file, unread: byte offset of its first element, shape and strides (in elements)."""

    dtype: np.dtype
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements from the first to the last one, both included."""
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))


class _Unpickler(pickle._Unpickler):
    """Follows a pickle's instructions; what they would import or call becomes a `Record`.

    The one written in Python, since the other reserves as much memory as the file asks it to.
    """

    def __init__(self, file: Any) -> None:
        # torch writes the strings of protocol 2 as UTF-8
        super().__init__(file, encoding="utf-8")
        self._classes: dict[tuple[str, str], type] = {("collections", "OrderedDict"): _Dict}

    def find_class(self, module_name: str, global_name: str) -> Any:
        """A record class instead of the class or function of that name; nothing is imported."""
        key = (module_name, global_name)
        if key not in self._classes:
            self._classes[key] = type("_Named", (Record,), {"module": module_name, "name": global_name})
        return self._classes[key]

    def persistent_load(self, pid: Any) -> Record:
        """What torch calls a storage: the bytes of one or more tensors, in an entry of their own."""
        match pid:
            case ("storage", type() as kind, str() as key, *_) if issubclass(kind, Record):
                return _Storage(kind.name, str(key))
        raise pickle.UnpicklingError("a persistent id that is no storage")


class TorchFile:
    """One file of torch.save. Raises UserError for a file that is no torch checkpoint, or is truncated or damaged."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                head = file.read(64)
                # an empty file cannot be mapped; it is no zip archive either
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if head else b""
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None
        self._entries = self._directory(head)

    def read(self, name: str, tensor: Tensor) -> Shaped[np.ndarray, "..."]:
        """A tensor in the file's number format, contiguous; only its bytes are read."""
        if 0 in tensor.shape:
            return np.empty(tensor.shape, tensor.dtype)
        size = tensor.dtype.itemsize
        try:  # read, not mapped: that is several times faster, and a file cut meanwhile is an error, not a crash
            flat = np.fromfile(self.path, f"u{size}", tensor.span, offset=tensor.start)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from None
        if flat.size != tensor.span:
            self.damaged(f"tensor {name!r}")
        steps = [step * size for step in tensor.strides]
        value = np.asarray(np.lib.stride_tricks.as_strided(flat, tensor.shape, steps), order="C")
        return value.view(tensor.dtype)

    def _directory(self, head: bytes) -> dict[str, tuple[int, int]]:
        """Entry name (without the archive's own prefix) -> (first byte, length) of what it stores."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                infos = archive.infolist()
            if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                raise ValueError("torch does not compress what it saves")
            starts = [self._start(info) for info in infos]
        except (zipfile.BadZipFile, OSError, ValueError, LookupError, NotImplementedError, struct.error) as error:
            if _OLD_FORMAT in head:
                raise UserError(
                    f"{self.path} is a torch file of the format before 1.6; torch.load it and torch.save it again"
                ) from None
            self.damaged(" ".join(str(error).split()) or "no zip archive")
        names = [info.filename for info in infos]
        pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1 or len(set(names)) != len(names):
            self.damaged("it does not hold one data.pkl")
        prefix = pickles[0].removesuffix("data.pkl")
        entries = {
            info.filename.removeprefix(prefix): (start, info.file_size)
            for info, start in zip(infos, starts, strict=True)
            if info.filename.startswith(prefix)
        }
        if "byteorder" in entries and self._stored(entries["byteorder"]).strip() != b"little":
            raise UserError(f"{self.path} was written on a big-endian machine; load it with torch and save it again")
        return entries

    def _start(self, info: zipfile.ZipInfo) -> int:
        """Where an entry's content begins: past its local header, whose extra field torch uses for alignment."""
        signature, name, extra = _LOCAL_HEADER.unpack_from(self._bytes, info.header_offset)
        start = info.header_offset + _LOCAL_HEADER.size + name + extra
        if signature != b"PK\x03\x04" or start + info.file_size > len(self._bytes):
            raise ValueError(f"entry {info.filename!r} lies outside the file")
        return start

    def _stored(self, place: tuple[int, int]) -> bytes:
        return self._bytes[place[0] : place[0] + place[1]]

    def damaged(self, reason: str) -> NoReturn:
        raise UserError(f"{self.path} is truncated or no torch checkpoint ({reason})")

    def content(self) -> Any:
        """What was saved: dicts and lists, with a `Record` for every object of a class."""
        try:
            return _Unpickler(io.BytesIO(self._stored(self._entries["data.pkl"]))).load()
        except _PICKLE_ERRORS as error:
            self.damaged(f"data.pkl: {' '.join(str(error).split()) or type(error).__name__}")

    def tensor(self, name: str, value: Any) -> Tensor:
        """Where a tensor of `content` lies; UserError for anything else, under the name given."""
        while isinstance(value, Record) and value.module == "torch._utils" and value.name.startswith("_rebuild_param"):
            value = value.args[0] if value.args else None
        if not isinstance(value, Record):
            raise UserError(f"{self.path}: {name!r} is no tensor")
        match (value.module, value.name, value.args):
            case (
                "torch._utils",
                "_rebuild_tensor_v2",
                (_Storage() as storage, int() as offset, shape, strides, *rest),
            ):
                flags = rest[2] if len(rest) > 2 else None  # negated or conjugated when read
            case _:
                raise UserError(
                    f"{self.path}: {name!r} is stored as {value.module}.{value.name}, not as a plain tensor"
                )
        kind, key = storage.args
        dtype, entry = _STORAGES.get(kind), self._entries.get(f"data/{key}")
        if dtype is None or flags:
            raise UserError(f"{self.path}: tensor {name!r} is stored as {kind}, which we cannot read")
        if entry is None or not _sizes(shape) or not _sizes(strides) or len(shape) != len(strides) or offset < 0:
            self.damaged(f"tensor {name!r}")
        start, length = entry
        tensor = Tensor(dtype, start + offset * dtype.itemsize, tuple(shape), tuple(strides))
        # no more elements than bytes: a stride of zero could make a terabyte of one number
        count = max(tensor.span if math.prod(shape) else 0, math.prod(shape))
        if (offset + count) * dtype.itemsize > length:
            self.damaged(f"tensor {name!r} reaches past the end of its data")
        return tensor


def _sizes(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(n, int) and 0 <= n < 2**48 for n in value) and len(value) <= 8
