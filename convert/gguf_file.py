"""GGUF containers: checked header, typed metadata and tensors of one file, or of all parts of a split one."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import mmap
import os
import re
import struct
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Float

from uniql_jax.errors import UserError

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_VERSIONS = (2, 3)
_MOST = 2**31  # larger sizes are damage; they would only cost memory
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
REQUIRED: Any = object()


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: file, first byte, length in bytes; its shape (slowest dimension first) and GGML type."""

    path: Path
    start: int
    nbytes: int
    shape: tuple[int, ...]
    kind: Any

    def read(self, name: str) -> Float[np.ndarray, "..."]:
        """The tensor in float32.

        Args:
          name: what an error message calls it.

        Raises:
          UserError: the file is shorter than its header says, or the type cannot be dequantized.
        """
        import gguf

        try:
            data = np.fromfile(self.path, np.uint8, self.nbytes, offset=self.start)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from None
        if data.size != self.nbytes:
            raise UserError(f"{self.path} is truncated or no GGUF file (tensor {name!r})")
        if self.kind.name in ("F32", "F16"):
            return data.view("<f4" if self.kind.name == "F32" else "<f2").astype(np.float32).reshape(self.shape)
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # of damaged scales; use of the weights refuses them
                value = gguf.quants.dequantize(data.reshape(*self.shape[:-1], -1), self.kind)
        except NotImplementedError:
            raise UserError(
                f"tensor {name!r} of {self.path} is stored as {self.kind.name}, which is not supported"
            ) from None
        return np.asarray(value, np.float32).reshape(self.shape)


class GgufFile:
    """Metadata and tensors of a GGUF file; of a split one (NAME-00001-of-00003.gguf), any part may be given.

    Raises UserError for files that are damaged, of another kind, or not all there. The accessors return a metadata
    value of one type and raise UserError where it has another one, or is missing and no default is given.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if importlib.util.find_spec("gguf") is None:
            raise UserError("a .gguf file needs the package gguf: pip install 'uniql-jax[gguf]'")
        self.path = Path(path)
        self.fields, self.tensors = _Header(self.path).parse()
        count = self.count("split.count", 1)
        if count > 1:
            self._add_parts(count)

    def _add_parts(self, count: int) -> None:
        """Read every part; the first holds the model's metadata, each holds its own tensors."""
        named = _PART.fullmatch(self.path.name)
        if named is None or int(named[3]) != count:
            raise UserError(
                f"{self.path} is a part of {count}; name the parts NAME-00001-of-{count:05d}.gguf and so on"
            )
        parts = [self.path.with_name(f"{named[1]}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
        for part in parts:
            if not part.is_file():
                raise UserError(f"{part} is missing: {self.path} is one of {count} parts of a model")
        given, self.tensors, first = self.path, {}, {}
        for i, part in enumerate(parts):
            self.path = part
            self.fields, tensors = _Header(part).parse()
            found = (self.count("split.no", REQUIRED), self.count("split.count", REQUIRED))
            if found != (i, count):
                raise UserError(f"{part} says that it is part {found[0] + 1} of {found[1]}, unlike its name")
            if twice := sorted(self.tensors.keys() & tensors.keys()):
                raise UserError(f"tensor {twice[0]!r} is stored twice, the second time in {part}")
            self.tensors |= tensors
            first = first or self.fields
        self.fields, self.path = first, parts[0]
        total = self.count("split.tensors.count", len(self.tensors))
        if total != len(self.tensors):
            raise UserError(f"the {count} parts of {given} hold {len(self.tensors)} tensors instead of {total}")

    def __contains__(self, key: str) -> bool:
        return key in self.fields

    def _get(self, key: str, default: Any) -> Any:
        if key in self.fields:
            return self.fields[key]
        if default is REQUIRED:
            raise UserError(f"{self.path} has no metadata {key!r}")
        return default

    def _refuse(self, key: str, wanted: str) -> NoReturn:
        value = self.fields[key]
        shown = f"an array of {len(value)}" if isinstance(value, (list, np.ndarray)) else repr(value)[:60]
        raise UserError(f"{self.path}: {key} must be {wanted}, not {shown}")

    def count(self, key: str, default: Any = REQUIRED) -> Any:
        """A whole number from 0; an array that repeats one (a value per layer) counts as that number."""
        value = self._get(key, default)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size and (value == value[0]).all():
            value = int(value[0])
        if value is default and key not in self.fields:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MOST:
            self._refuse(key, "a whole number, the same for all layers")
        return value

    def size(self, key: str, default: Any = REQUIRED) -> Any:
        """A whole number from 1, as in `count`."""
        value = self.count(key, default)
        if value == 0 and key in self.fields:
            self._refuse(key, "at least 1")
        return value

    def number(self, key: str, default: Any = REQUIRED) -> Any:
        """A positive, finite number."""
        value = self._get(key, default)
        if key not in self.fields:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            self._refuse(key, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            self._refuse(key, "true or false")
        return value

    def text(self, key: str, default: Any = REQUIRED) -> Any:
        """UTF-8 text."""
        value = self._get(key, default)
        if key in self.fields and not (isinstance(value, str) and _is_utf8(value)):
            self._refuse(key, "UTF-8 text")
        return value

    def texts(self, key: str) -> list[str]:
        """An array of UTF-8 texts."""
        value = self._get(key, REQUIRED)
        if not isinstance(value, list) or not _is_utf8("".join(value)):
            self._refuse(key, "an array of UTF-8 texts")
        return value

    def numbers(self, key: str, count: int) -> np.ndarray | None:
        """An array with at least `count` numbers, of which the first `count` are returned; None if it is missing."""
        value = self._get(key, None)
        if key not in self.fields:
            return None
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf" or len(value) < count:
            self._refuse(key, f"an array of {count} numbers")
        return value[:count]


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


class _Header:
    """One file's header, every length of which is checked before it is followed.

    The gguf package's own reader walks past the end of a damaged file for as long as its counts say.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0
        try:
            with open(path, "rb") as file:
                filled = os.fstat(file.fileno()).st_size > 0  # an empty file cannot be mapped
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if filled else b""
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None

    def parse(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The metadata, and the tensors by name."""
        if self._take(4) != b"GGUF":
            self._damaged("it does not begin with GGUF")
        version = self._int("<I")
        if version & 0xFFFF == 0:
            raise UserError(f"{self._path} is a big-endian GGUF file; convert it to little-endian first")
        if version not in _VERSIONS:
            raise UserError(f"{self._path} is GGUF version {version}; versions 2 and 3 are supported")
        tensors, fields = self._int("<Q"), self._int("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(fields):
            key = self._string()
            if key in metadata:
                self._damaged(f"metadata {key!r} is stored twice")
            metadata[key] = self._value(self._int("<I"))
        infos = {}
        for _ in range(tensors):
            name = self._string()
            if name in infos:
                raise UserError(f"tensor {name!r} is stored twice in {self._path}")
            dims = self._int("<I")
            if dims > 4:
                self._damaged(f"tensor {name!r} has {dims} dimensions")
            infos[name] = [self._int("<Q") for _ in range(dims)], self._int("<I"), self._int("<Q")
        align = metadata.get("general.alignment", 32)
        if type(align) is not int or not 0 < align <= 2**20 or align & (align - 1):
            self._damaged("general.alignment is no power of two")
        begin = -(-self._at // align) * align
        return metadata, {name: self._tensor(name, begin, *info) for name, info in infos.items()}

    def _tensor(self, name: str, begin: int, dims: list[int], kind: int, offset: int) -> Tensor:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            known = GGMLQuantizationType(kind)
            block, nbytes = GGML_QUANT_SIZES[known]
        except (ValueError, KeyError):
            raise UserError(
                f"tensor {name!r} of {self._path} is stored as GGML type {kind}, which is not supported"
            ) from None
        count = math.prod(dims)
        if (dims[0] if dims else 1) % block or max(dims, default=1) >= _MOST:
            self._damaged(f"tensor {name!r} has the shape {dims[::-1]}")
        tensor = Tensor(self._path, begin + offset, count // block * nbytes, tuple(reversed(dims)), known)
        if tensor.start + tensor.nbytes > len(self._bytes):
            self._damaged(f"tensor {name!r} reaches past its end")
        return tensor

    def _damaged(self, reason: str) -> NoReturn:
        raise UserError(f"{self._path} is truncated or no GGUF file ({reason})")

    def _take(self, count: int) -> bytes:
        if count > len(self._bytes) - self._at:
            self._damaged("its header reaches past its end")
        self._at += count
        return self._bytes[self._at - count : self._at]

    def _int(self, kind: str) -> int:
        return struct.unpack(kind, self._take(struct.calcsize(kind)))[0]

    def _string(self) -> str:
        # what is no UTF-8 is refused where it is used
        return self._take(self._int("<Q")).decode("utf-8", "surrogateescape")

    def _strings(self, count: int) -> list[str]:
        # A vocabulary has a quarter of a million: read without a call for each.
        found, at, end, length = [], self._at, len(self._bytes), struct.Struct("<Q").unpack_from
        for _ in range(count):
            begin = at + 8
            if begin > end or (at := begin + length(self._bytes, at)[0]) > end:
                self._damaged("its header reaches past its end")
            found.append(self._bytes[begin:at].decode("utf-8", "surrogateescape"))
        self._at = at
        return found

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._numbers(kind, 1)[0].item()
        if kind != _ARRAY:
            self._damaged(f"metadata of type {kind}")
        kind, count = self._int("<I"), self._int("<Q")
        if kind == _STRING:
            return self._strings(count)
        if kind not in _SCALARS:
            self._damaged(f"an array of type {kind}")
        return self._numbers(kind, count)

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        dtype = np.dtype(_SCALARS[kind])
        found = np.frombuffer(self._take(count * dtype.itemsize), np.uint8 if kind == _BOOL else dtype)
        return found != 0 if kind == _BOOL else found
