"""Checkpoints whose matrices are packed integers already (GPTQ, AWQ, compressed-tensors), read as dense float32.

What rounding lost is lost: this is for models of which nothing better is at hand. Each format is a class that knows
which tensors make up a matrix X.weight, and how.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Int, Shaped

from uniql_jax.errors import UserError
from uniql_jax.files import ShardReader

Headers = Mapping[str, tuple[np.dtype, tuple[int, ...]]]
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which four bits of a word hold the k-th of eight neighbours."""


def unpack(
    words: Int[np.ndarray, "..."], bits: int, axis: int, order: tuple[int, ...] | None = None
) -> Int[np.ndarray, "..."]:
    """Unsigned integers of int32 words along an axis, the first in the lowest bits unless `order` says where.

    Args:
        words: int32.
        bits: 2, 4 or 8.
        axis: grows by the number of integers of a word.
        order: place in the word of each integer.
    """
    count = 32 // bits
    last = np.moveaxis(words, axis, -1).view(np.uint32)[..., None]
    shifts = np.asarray(order if order is not None else range(count), np.uint32) * np.uint32(bits)
    values = (last >> shifts) & np.uint32((1 << bits) - 1)
    return np.moveaxis(values.reshape(*values.shape[:-2], -1).astype(np.int16), -1, axis)


class Format(Protocol):
    """How one tool stores a matrix [out, in] in several tensors that share the prefix X."""

    marker: str
    """What the name of the packed integers ends in."""

    def shape(self, stem: str, found: Headers) -> tuple[int, int]:
        """Of the dense matrix, from headers."""
        ...

    def parts(self, stem: str, found: Headers) -> tuple[str, ...]:
        """The tensors that make it up."""
        ...

    def dense(self, stem: str, tensors: Mapping[str, np.ndarray], shape: tuple[int, int]) -> Float[np.ndarray, "n k"]:
        """The matrix, float32."""
        ...


class _Settings(NamedTuple):
    bits: int
    group: int


def _settings(section: Mapping[str, Any], name: str, bits: tuple[int, ...]) -> _Settings:
    """Bits and group size; -1 is one group for all inputs."""
    found = _Settings(section.get("bits", 4), section.get("group_size", 128))
    if found.bits not in bits:
        raise UserError(f"{name} has {found.bits!r} bits a weight; of this format {', '.join(map(str, bits))} are read")
    if not isinstance(found.group, int) or (found.group < 1 and found.group != -1):
        raise UserError(f"{name} has groups of {found.group!r}, which is not a number of weights")
    return found


def _checked(index: Int[np.ndarray, "..."], width: int) -> Int[np.ndarray, " width"]:
    """The group of every input, as a checkpoint stores it."""
    if index.shape != (width,) or index.min(initial=0) < 0:
        raise ValueError(f"groups of {width} inputs are not {index.shape} numbers from 0")
    return index


class Gptq:
    """qweight int32 [in / n, out], qzeros int32 [groups, out / n], scales [groups, out], g_idx int32 [in] (or none).

    n = 32 / bits integers a word, the first in the lowest bits: w = scale (q - zero). The first version of the format
    (`checkpoint_format` "gptq") stores zero - 1, modulo the range; "gptq_v2" stores zero.
    """

    marker = ".qweight"

    def __init__(self, section: Mapping[str, Any], name: str):
        self.bits, self.group = _settings(section, name, (2, 4, 8))
        version = section.get("checkpoint_format", "gptq")
        if version not in ("gptq", "gptq_v2"):
            raise UserError(f"{name} has the GPTQ layout {version!r}; gptq and gptq_v2 are read")
        self.offset = 1 if version == "gptq" else 0

    def shape(self, stem: str, found: Headers) -> tuple[int, int]:
        """See Format."""
        rows, out = found[f"{stem}.qweight"][1]
        return out, rows * (32 // self.bits)

    def parts(self, stem: str, found: Headers) -> tuple[str, ...]:
        """See Format."""
        return ("qweight", "qzeros", "scales", *(("g_idx",) if f"{stem}.g_idx" in found else ()))

    def dense(self, stem: str, tensors: Mapping[str, np.ndarray], shape: tuple[int, int]) -> Float[np.ndarray, "n k"]:
        """See Format."""
        out, width = shape
        codes = unpack(tensors["qweight"], self.bits, 0)
        zeros = (unpack(tensors["qzeros"], self.bits, 1)[:, :out] + self.offset) & ((1 << self.bits) - 1)
        scale = tensors["scales"].astype(np.float32)
        group = width if self.group == -1 else self.group
        index = _checked(tensors["g_idx"], width) if "g_idx" in tensors else np.arange(width) // group
        return np.ascontiguousarray(((codes - zeros[index]) * scale[index]).T)


class Awq:
    """qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales [groups, out]: w = scale (q - zero).

    Eight neighbouring outputs share a word, in the order AWQ_ORDER ("gemm", the only version that is read).
    """

    marker = ".qweight"

    def __init__(self, section: Mapping[str, Any], name: str):
        self.bits, self.group = _settings(section, name, (4,))
        version = str(section.get("version", "gemm")).lower()
        if version != "gemm":
            raise UserError(f"{name} has the AWQ layout {version!r}; gemm is read")

    def shape(self, stem: str, found: Headers) -> tuple[int, int]:
        """See Format."""
        width, words = found[f"{stem}.qweight"][1]
        return words * 8, width

    def parts(self, stem: str, found: Headers) -> tuple[str, ...]:
        """See Format."""
        return ("qweight", "qzeros", "scales")

    def dense(self, stem: str, tensors: Mapping[str, np.ndarray], shape: tuple[int, int]) -> Float[np.ndarray, "n k"]:
        """See Format."""
        codes, zeros = (unpack(tensors[part], 4, 1, AWQ_ORDER) for part in ("qweight", "qzeros"))
        index = np.arange(shape[1]) // (shape[1] if self.group == -1 else self.group)
        return np.ascontiguousarray(((codes - zeros[index]) * tensors["scales"].astype(np.float32)[index]).T)


class CompressedTensors:
    """weight_packed int32 [out, in / n], weight_scale [out, groups], weight_shape [2], and where they are there
    weight_zero_point int32 [out / n, groups] and weight_g_idx [in] ("pack-quantized").

    Integers and zero points are stored with half their range added. Modules of the format "int-quantized" have weight
    int8 [out, in] in place of weight_packed.
    """

    marker = ".weight_packed"

    def __init__(self, section: Mapping[str, Any], name: str):
        groups, form = section.get("config_groups"), section.get("format")
        parts = [group for group in (groups.values() if isinstance(groups, dict) else ()) if isinstance(group, dict)]
        forms = {group.get("format") or form for group in parts} if form == "mixed-precision" else {form}
        if other := forms - {"pack-quantized", "int-quantized"}:
            read = "pack-quantized and int-quantized are read"
            raise UserError(f"{name} has the compressed-tensors layout {min(other, key=str)!r}; {read}")
        found = {
            (weights.get("num_bits"), weights.get("type", "int"))
            for group in parts
            if (group.get("format") or form) != "int-quantized" and isinstance(weights := group.get("weights"), dict)
        }
        if len(found) != 1 or (kind := next(iter(found)))[0] not in (4, 8) or kind[1] != "int":
            raise UserError(f"{name} does not have 4 or 8 bits, the same for all its packed matrices")
        self.bits = int(kind[0])

    def shape(self, stem: str, found: Headers) -> tuple[int, int]:
        """See Format: the stored words are padded, and the true width is where another tensor tells; see `dense`."""
        if f"{stem}.weight" in found:
            out, width = found[f"{stem}.weight"][1]
            return out, width
        out, words = found[f"{stem}.weight_packed"][1]
        return out, words * (32 // self.bits)

    def parts(self, stem: str, found: Headers) -> tuple[str, ...]:
        """See Format."""
        optional = ("weight_zero_point", "weight_g_idx")
        integers = "weight" if f"{stem}.weight" in found else "weight_packed"
        return (integers, "weight_scale", *(part for part in optional if f"{stem}.{part}" in found))

    def dense(self, stem: str, tensors: Mapping[str, np.ndarray], shape: tuple[int, int]) -> Float[np.ndarray, "n k"]:
        """See Format."""
        out, width = shape
        if "weight" in tensors:
            codes = tensors["weight"].astype(np.int32)
        else:
            codes = unpack(tensors["weight_packed"], self.bits, 1)[:, :width].astype(np.int32) - (1 << (self.bits - 1))
        scale = tensors["weight_scale"].astype(np.float32).reshape(out, -1)
        if "weight_g_idx" in tensors:
            index = _checked(tensors["weight_g_idx"], width)
        else:
            index = np.arange(width) // -(-width // scale.shape[1])
        if "weight_zero_point" in tensors:
            zeros = unpack(tensors["weight_zero_point"], self.bits, 0)[:out].astype(np.int32) - (1 << (self.bits - 1))
            codes = codes - zeros[:, index]
        return codes * scale[:, index]


FORMATS: dict[str, Any] = {"gptq": Gptq, "awq": Awq, "compressed-tensors": CompressedTensors}
"""By `quant_method` of config.json."""


class DequantizingReader:
    """The tensors of a folder with every packed matrix as one dense X.weight, float32.

    Args:
        reader: of the folder.
        section: `quantization_config` of its config.json.
        name: what the user called it.

    Raises:
        UserError: a format that is not read, or tensors that do not fit one another.
    """

    def __init__(self, reader: ShardReader, section: Mapping[str, Any], name: str):
        method = section.get("quant_method")
        if method not in FORMATS:
            raise UserError(f"{name} is quantized by {method!r}, which is not read; {', '.join(FORMATS)} are")
        self._reader, self._name = reader, name
        self._format: Format = FORMATS[method](section, name)
        found = reader.names()
        self._packed: dict[str, tuple[str, tuple[str, ...], tuple[int, int]]] = {}
        made_of = set()
        for tensor in found:
            if (stem := _stem(tensor, found, self._format.marker)) is not None:
                parts = self._format.parts(stem, found)
                if missing := [part for part in parts if f"{stem}.{part}" not in found]:
                    raise UserError(f"{name}: tensor {f'{stem}.{missing[0]}'!r} is missing")
                if len(found[tensor][1]) != 2:
                    raise UserError(f"{name}: tensor {tensor!r} is no matrix")
                self._packed[f"{stem}.weight"] = stem, parts, self._shape(stem, found)
                made_of |= {f"{stem}.{part}" for part in (*parts, "weight_shape")}
        if not self._packed:
            raise UserError(f"{name} says that it is quantized by {method}, but has no packed matrix")
        kept = {tensor: kind for tensor, kind in found.items() if tensor not in made_of and not _empty_bias(kind)}
        self._names = kept | {weight: (np.dtype(np.float32), shape) for weight, (_, _, shape) in self._packed.items()}

    def _shape(self, stem: str, found: Headers) -> tuple[int, int]:
        if f"{stem}.weight_shape" not in found:
            return self._format.shape(stem, found)
        out, width = (int(size) for size in self._reader.read(f"{stem}.weight_shape").reshape(-1)[:2])
        padded = self._format.shape(stem, found)
        if out != padded[0] or not padded[1] - 16 < width <= padded[1]:
            raise UserError(f"{self._name}: {stem}.weight_shape says {out} x {width}, but {padded} are stored")
        return out, width

    @property
    def packed(self) -> tuple[str, ...]:
        """Names of the matrices that were packed."""
        return tuple(self._packed)

    @property
    def bytes_read(self) -> int:
        """Bytes read so far, as stored."""
        return self._reader.bytes_read

    def names(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every tensor, packed matrices as dense ones."""
        return dict(self._names)

    def read(self, name: str, rows: int | None = None) -> Shaped[np.ndarray, "..."]:
        """One tensor, or the first `rows` entries of its leading axis.

        Raises:
            UserError: parts of a packed matrix that do not fit one another.
        """
        if name not in self._packed:
            return self._reader.read(name, rows)
        stem, parts, shape = self._packed[name]
        tensors = {part: self._reader.read(f"{stem}.{part}") for part in parts}
        try:
            value = self._format.dense(stem, tensors, shape)
        except (ValueError, IndexError) as error:
            raise UserError(f"{self._name}: the tensors of {stem!r} do not fit one another ({error})") from None
        if value.shape != shape or not math.prod(shape):
            raise UserError(f"{self._name}: the tensors of {stem!r} do not fit one another")
        return value[:rows].astype(np.float32, copy=False)


def _stem(tensor: str, found: Headers, marker: str) -> str | None:
    """What the parts of a matrix begin with, by the tensor of its integers; None for any other tensor."""
    if tensor.endswith(marker):
        return tensor.removesuffix(marker)
    stem = tensor.removesuffix(".weight")
    whole = found[tensor][0] == np.int8 and f"{stem}.weight_scale" in found
    return stem if whole and tensor.endswith(".weight") else None


def _empty_bias(kind: tuple[np.dtype, tuple[int, ...]]) -> bool:
    """Whether a tensor has no entries at all, as some tools write for a bias that is not there."""
    return 0 in kind[1]
