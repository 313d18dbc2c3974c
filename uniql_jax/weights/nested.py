"""A weight held as 4-bit integers in bit planes, of which the leading 3 bits are a model of their own.

The sorted axis leads in every plane. Pruning keeps a prefix of all planes, and fewer bits keep a shorter prefix of the
last plane: the first entries have 4 bits, those behind them 3. Nothing is ever rounded again.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from uniql_jax.pallas_kernels.dequant_matmul import three_bit, tiling
from uniql_jax.pallas_kernels.packing import SHIFTS
from uniql_jax.weights.planes import BYTE, PLANES, columns_product, plane_of, rows_product, values_of
from uniql_jax.weights.quantized import QuantizedArray

_SPREAD = ((np.arange(256)[:, None] >> np.arange(BYTE) & 1) << np.asarray(SHIFTS)).sum(1).astype(np.uint32)
"""The bits of a byte of a plane, each where the lowest bit of its weight is in a word of 4-bit weights."""


@flax.struct.dataclass
class NestedArray:
    """Codes c from -8 to 7 with h = floor(c / 2): c * fine where all bits are held, else (h + 1/4) * coarse.

    contract "last": the logical shape is [*lead, width], `leading` is [*lead, 3, bytes], `last` [*lead, bytes], the
    scales are [*lead, groups]. contract "first": the logical shape is [count, *inner, features], of which
    count * prod(inner) is contracted; `leading` is [bytes, 3, features], `last` [bytes, features], the scales are
    [groups, features]. Planes hold h + 4 (three bits) and c - 2 h (one), eight weights a byte, the first one lowest.
    `last` and `fine` are those of the first `full` entries of the leading axis.
    """

    leading: Any  # uint8 and bfloat16 as above; Any, since jax.tree.map and jax.eval_shape may put anything in
    last: Any
    fine: Any
    coarse: Any
    group: int = flax.struct.field(pytree_node=False)
    contract: str = flax.struct.field(pytree_node=False)
    width: int = flax.struct.field(pytree_node=False)  # contracted elements (unpadded)
    inner: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())  # contracted dims after the leading one

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape of the weight."""
        if self.contract == "last":
            return (*self.coarse.shape[:-1], self.width)
        return (self.width // math.prod(self.inner), *self.inner, self.coarse.shape[-1])

    @property
    def full(self) -> int:
        """Entries of the leading axis that have all bits."""
        if self.contract == "last":
            return self.fine.shape[0]
        return min(self.fine.shape[0] * self.group, self.width) // math.prod(self.inner)

    @property
    def nbytes(self) -> int:
        """Bytes held: planes and scales."""
        return int(sum(part.nbytes for part in (self.leading, self.last, self.fine, self.coarse)))

    def take_prefix(self, count: int) -> NestedArray:
        """The first `count` entries of the leading axis. Raises ValueError when the cut would split a group."""
        if count == self.shape[0]:
            return self
        bytes_, groups = self._cut(count)
        kept = self.take_bits(min(count, self.full))
        width = self.width if self.contract == "last" else count * math.prod(self.inner)
        return dataclasses.replace(kept, leading=self.leading[:bytes_], coarse=self.coarse[:groups], width=width)

    def drop_prefix(self, count: int) -> NestedArray:
        """The entries behind the first `count`, of which none has all bits.

        Raises ValueError when the cut would split a group, or where more entries have all bits.
        """
        if self.full > count:
            raise ValueError(f"{self.full} entries have all bits, more than {count}")
        (bytes_, groups), rest = self._cut(count), self.take_bits(0)
        width = self.width if self.contract == "last" else self.width - count * math.prod(self.inner)
        return dataclasses.replace(rest, leading=self.leading[bytes_:], coarse=self.coarse[groups:], width=width)

    def take_bits(self, full: int) -> NestedArray:
        """The same entries, with all bits of the first `full` alone; of the others the leading bits.

        Raises ValueError when the border would split a group, or where more entries have all bits than do now.
        """
        if full > self.full:
            raise ValueError(f"{self.full} entries have all bits, fewer than {full}")
        if full == self.full:
            return self
        bytes_, groups = self._cut(full)
        return dataclasses.replace(self, last=self.last[:bytes_], fine=self.fine[:groups])

    def _cut(self, count: int) -> tuple[int, int]:
        """Entries of the planes' and of the scales' leading axes that hold the first `count` of the weight's."""
        if self.contract == "last":
            return count, count
        width = count * math.prod(self.inner)
        if width % self.group:
            raise ValueError(f"a cut at {count} splits a quantization group of {self.group}")
        return width // BYTE, width // self.group

    def dense(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
        """The weight as a plain array of its logical shape, computed in float32 and cast to `dtype`."""
        return _dense(self, jnp.dtype(dtype))

    def rows(self, x: Float[Array, "*b h"]) -> Float[Array, "*b out"]:
        """weight @ x over the last dimension, the weight's leading ones flattened; float32.

        A block of rows is dense at a time.
        """
        return jnp.concatenate([rows_product(part, x) for part in self._parts()], axis=-1)

    def columns(self, flat: Float[Array, "*b k"]) -> Float[Array, "*b h"]:
        """x @ weight, x flattened like the weight's leading dimensions; float32.

        A block of what is contracted is dense at a time.
        """
        border = self.full * math.prod(self.inner)
        parts = self._parts()
        each = [flat] if len(parts) == 1 else [flat[..., :border], flat[..., border:]]
        return functools.reduce(jnp.add, [columns_product(part, x) for part, x in zip(parts, each, strict=True)])

    def _parts(self) -> list[NestedArray]:
        """The entries of all bits, and the others; either alone where there are no others."""
        parts = jax.tree.map(jnp.asarray, self)
        if not self.full or self.full == self.shape[0]:
            return [parts]
        border = parts.take_prefix(self.full)
        return [border, dataclasses.replace(parts, last=parts.last[:0], fine=parts.fine[:0]).drop_prefix(self.full)]

    def lookup(self, index: Int[Array, "*b"], dtype: DTypeLike) -> Float[Array, "*b h"]:
        """Entries of the leading axis, as an embedding's are looked up; contract "last" only."""
        if self.contract != "last" or self.leading.ndim != 3:
            raise NotImplementedError("only a matrix that contracts its last dimension is looked up")
        parts = jax.tree.map(jnp.asarray, self)
        value = values_of(parts.leading[index], None, parts.coarse[index], self.group)
        if self.full:
            inside = jnp.minimum(index, self.full - 1)
            whole = values_of(parts.leading[index], parts.last[inside], parts.fine[inside], self.group)
            value = jnp.where((index < self.full)[..., None], whole, value)
        return value[..., : self.width].astype(dtype)

    def packed(self) -> QuantizedArray:
        """The same weight, where all entries have all bits, in 4-bit words; on the host, where no program is compiled.

        Raises ValueError where some entries have the leading bits alone.
        """
        if self.full != self.shape[0]:
            raise ValueError(f"{self.full} of {self.shape[0]} entries have all bits")
        planes = [*np.moveaxis(np.asarray(self.leading), -2, 0), np.asarray(self.last)]
        words = functools.reduce(lambda found, plane: found << 1 | _SPREAD[plane], planes, np.uint32(0))
        return QuantizedArray(
            words.view(np.int32), np.asarray(self.fine), bits=4, group=self.group, contract=self.contract,
            width=self.width, inner=self.inner,
        )  # fmt: skip

    def tiled(self) -> QuantizedArray:
        """The leading bits of all entries in tiles that kernels read; on the host, where no program is compiled.

        Of jax.ShapeDtypeStructs in place of arrays, what that has. Raises ValueError where entries have all bits,
        NotImplementedError for groups that no tile holds.
        """
        if self.full:
            raise ValueError(f"{self.full} entries have all bits")
        if self.group != tiling.GROUP:
            raise NotImplementedError(f"tiles hold groups of {tiling.GROUP}, not of {self.group}")
        last, scale = self.contract == "last", self.coarse
        if isinstance(scale, jax.ShapeDtypeStruct):
            rows, groups = math.prod(scale.shape[:-1]) if last else scale.shape[-1], scale.shape[-1 if last else 0]
            data: Any = jax.ShapeDtypeStruct(three_bit.tiles_shape(rows, groups, self.contract), jnp.int32)
        else:
            leading, scale = np.asarray(self.leading), np.asarray(scale)
            data = three_bit.tile(leading.reshape(-1, *leading.shape[-2:]) if last else leading, self.contract)
        return QuantizedArray(
            data, scale, bits=three_bit.BITS, group=self.group, contract=self.contract, width=self.width,
            inner=self.inner, layout=tiling.LAYOUTS[self.contract],
        )  # fmt: skip

    def tensors(self, name: str) -> Mapping[str, np.ndarray]:
        """What is stored of it, by tensor name."""
        parts = {"leading": self.leading, "last": self.last, "fine": self.fine, "coarse": self.coarse}
        return {f"{name}.{part}": np.asarray(value) for part, value in parts.items()}


def leading_planes(words: QuantizedArray) -> UInt8[np.ndarray, "..."]:
    """The planes `leading` of 4-bit words in plain layout: the inverse of `NestedArray.packed`."""
    data = np.asarray(words.data).view(np.uint32)
    planes = []
    for plane in range(PLANES):
        found = np.zeros(data.shape, np.uint8)
        for i, shift in enumerate(SHIFTS):
            found |= ((data >> np.uint32(int(shift) + PLANES - plane)) & 1).astype(np.uint8) << i
        planes.append(found)
    return np.stack(planes, axis=-2)


def from_tiles(tiled: QuantizedArray) -> NestedArray:
    """Inverse of `NestedArray.tiled`, with numpy."""
    last, scale = tiled.contract == "last", np.asarray(tiled.scale)
    rows, groups = math.prod(scale.shape[:-1]) if last else scale.shape[-1], scale.shape[-1 if last else 0]
    leading = three_bit.untile(np.asarray(tiled.data), tiled.contract, rows, groups)
    leading = leading.reshape(*scale.shape[:-1], *leading.shape[1:]) if last else leading
    none = leading[:0, ..., 0, :] if last else leading[:0, 0]
    return NestedArray(
        leading, none, scale[:0], scale, group=tiled.group, contract=tiled.contract, width=tiled.width,
        inner=tiled.inner,
    )  # fmt: skip


def leading_bits(value: Any) -> Any:
    """A nested weight at its leading bits; whatever else a leaf is, unchanged."""
    return value.take_bits(0) if isinstance(value, NestedArray) else value


@functools.partial(jax.jit, static_argnames="dtype")
def _dense(weight: NestedArray, dtype: np.dtype) -> Float[Array, "..."]:
    leading, last, fine, coarse = weight.leading, weight.last, weight.fine, weight.coarse
    if weight.contract == "first":  # what is contracted goes last
        leading = jnp.moveaxis(leading, 0, -1).swapaxes(0, 1)
        last, fine, coarse = last.T, fine.T, coarse.T
        border = fine.shape[-1] * weight.group
        whole = values_of(leading[..., : last.shape[-1]], last, fine, weight.group)
        rest = values_of(leading[..., last.shape[-1] :], None, coarse[..., fine.shape[-1] :], weight.group)
        value = jnp.concatenate([whole[..., :border], rest], axis=-1)[..., : weight.width]
        return value.T.reshape(weight.shape).astype(dtype)
    count = fine.shape[0]
    whole = values_of(leading[:count], last, fine, weight.group)
    rest = values_of(leading[count:], None, coarse[count:], weight.group)
    return jnp.concatenate([whole, rest])[..., : weight.width].astype(dtype)


def from_nested_codes(
    codes: Int[Array, "rows width"],
    fine: Float[Array, "rows groups"],
    coarse: Float[Array, "rows groups"],
    *,
    group: int,
    contract: str,
    shape: tuple[int, ...],
) -> NestedArray:
    """Assemble a nested weight that has all bits.

    Args:
        codes: from -8 to 7.
        fine: a scale for every group of a row at 4 bits; stored as bfloat16.
        coarse: the same at 3 bits.
        group: contracted weights that share a scale, a multiple of 8.
        contract: "last" or "first": which dimensions of `shape` the columns of `codes` are.
        shape: the logical shape.

    Returns:
        The weight.
    """
    made = _assemble(codes, fine, coarse, group, contract)
    width = codes.shape[1]
    if contract == "first":
        return NestedArray(*made, group=group, contract=contract, width=width, inner=tuple(shape[1:-1]))
    lead = shape[:-1]
    made = (made[0].reshape(*lead, PLANES, -1), *(part.reshape(*lead, -1) for part in made[1:]))
    return NestedArray(*made, group=group, contract=contract, width=width)


@functools.partial(jax.jit, static_argnames=("group", "contract"))
def _assemble(
    codes: Int[Array, "rows width"], fine: Array, coarse: Array, group: int, contract: str
) -> tuple[Array, Array, Array, Array]:
    """Planes and scales of rows, turned where what is contracted goes first."""
    width = codes.shape[1]
    codes = jnp.pad(codes.astype(jnp.int32), ((0, 0), (0, fine.shape[1] * group - width)))
    high = (codes >> 1) + 4
    leading = jnp.stack([plane_of((high >> (PLANES - 1 - i)) & 1) for i in range(PLANES)], axis=1)
    last, fine, coarse = plane_of(codes & 1), fine.astype(jnp.bfloat16), coarse.astype(jnp.bfloat16)
    if contract == "first":
        return jnp.moveaxis(leading, -1, 0).swapaxes(1, 2), last.T, fine.T, coarse.T
    return leading, last, fine, coarse
