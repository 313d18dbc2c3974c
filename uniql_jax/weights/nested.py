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

from uniql_jax.weights.protocol import DenseArray

PLANES = 3
"""Of one bit each, the most significant first, that make up the leading bits."""
OFFSET = 0.25
"""What a leading integer h stands for beyond itself, in its own steps: half way between codes 2 h and 2 h + 1."""
BYTE = 8


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
        return _dense(jax.tree.map(jnp.asarray, self), jnp.dtype(dtype))

    def rows(self, x: Float[Array, "*b h"]) -> Float[Array, "*b out"]:
        """weight @ x over the last dimension, the weight's leading ones flattened; float32."""
        return DenseArray(self.dense(x.dtype)).rows(x)

    def columns(self, flat: Float[Array, "*b k"]) -> Float[Array, "*b h"]:
        """x @ weight, x flattened like the weight's leading dimensions; float32."""
        return DenseArray(self.dense(flat.dtype)).columns(flat)

    def lookup(self, index: Int[Array, "*b"], dtype: DTypeLike) -> Float[Array, "*b h"]:
        """Entries of the leading axis, as an embedding's are looked up; contract "last" only."""
        if self.contract != "last" or self.leading.ndim != 3:
            raise NotImplementedError("only a matrix that contracts its last dimension is looked up")
        parts = jax.tree.map(jnp.asarray, self)
        value = _values(parts.leading[index], None, parts.coarse[index], self.group)
        if self.full:
            inside = jnp.minimum(index, self.full - 1)
            whole = _values(parts.leading[index], parts.last[inside], parts.fine[inside], self.group)
            value = jnp.where((index < self.full)[..., None], whole, value)
        return value[..., : self.width].astype(dtype)

    def tensors(self, name: str) -> Mapping[str, np.ndarray]:
        """What is stored of it, by tensor name."""
        parts = {"leading": self.leading, "last": self.last, "fine": self.fine, "coarse": self.coarse}
        return {f"{name}.{part}": np.asarray(value) for part, value in parts.items()}


@functools.partial(jax.jit, static_argnames="dtype")
def _dense(weight: NestedArray, dtype: np.dtype) -> Float[Array, "..."]:
    leading, last, fine, coarse = weight.leading, weight.last, weight.fine, weight.coarse
    if weight.contract == "first":  # what is contracted goes last
        leading = jnp.moveaxis(leading, 0, -1).swapaxes(0, 1)
        last, fine, coarse = last.T, fine.T, coarse.T
        border = fine.shape[-1] * weight.group
        whole = _values(leading[..., : last.shape[-1]], last, fine, weight.group)
        rest = _values(leading[..., last.shape[-1] :], None, coarse[..., fine.shape[-1] :], weight.group)
        value = jnp.concatenate([whole[..., :border], rest], axis=-1)[..., : weight.width]
        return value.T.reshape(weight.shape).astype(dtype)
    count = fine.shape[0]
    whole = _values(leading[:count], last, fine, weight.group)
    rest = _values(leading[count:], None, coarse[count:], weight.group)
    return jnp.concatenate([whole, rest])[..., : weight.width].astype(dtype)


def _values(
    leading: UInt8[Array, "*b planes n"], last: UInt8[Array, "*b n"] | None, scale: Float[Array, "*b g"], group: int
) -> Float[Array, "*b w"]:
    """Values of planes whose last axis is contracted; `last` None: of the leading bits alone."""
    bits = _bits(leading).astype(jnp.int32)
    high = sum(bits[..., i, :] << (PLANES - 1 - i) for i in range(PLANES)) - 4
    if last is None:
        steps = jnp.asarray(high, jnp.float32) + OFFSET
    else:
        steps = (2 * high + _bits(last)).astype(jnp.float32)
    return steps * jnp.repeat(scale.astype(jnp.float32), group, axis=-1)


def _bits(plane: UInt8[Array, "*b n"]) -> UInt8[Array, "*b w"]:
    found = (plane[..., None] >> jnp.arange(BYTE, dtype=jnp.uint8)) & 1
    return found.reshape(*plane.shape[:-1], plane.shape[-1] * BYTE)


def _plane(bits: Int[Array, "*b w"]) -> UInt8[Array, "*b n"]:
    """Inverse of `_bits`."""
    groups = bits.astype(jnp.uint8).reshape(*bits.shape[:-1], bits.shape[-1] // BYTE, BYTE)
    return (groups << jnp.arange(BYTE, dtype=jnp.uint8)).sum(-1, dtype=jnp.uint8)


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
    width = codes.shape[1]
    codes = jnp.pad(codes.astype(jnp.int32), ((0, 0), (0, fine.shape[1] * group - width)))
    high = (codes >> 1) + 4
    leading = jnp.stack([_plane((high >> (PLANES - 1 - i)) & 1) for i in range(PLANES)], axis=1)
    last, fine, coarse = _plane(codes & 1), fine.astype(jnp.bfloat16), coarse.astype(jnp.bfloat16)
    if contract == "first":
        leading = jnp.moveaxis(leading, -1, 0).swapaxes(1, 2)
        parts = {"leading": leading, "last": last.T, "fine": fine.T, "coarse": coarse.T}
        return NestedArray(**parts, group=group, contract=contract, width=width, inner=tuple(shape[1:-1]))
    lead = shape[:-1]
    return NestedArray(
        leading.reshape(*lead, PLANES, -1), last.reshape(*lead, -1), fine.reshape(*lead, -1),
        coarse.reshape(*lead, -1), group=group, contract=contract, width=width,
    )  # fmt: skip
