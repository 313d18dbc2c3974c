"""A weight held as packed 4-bit (or plain 8-bit) integers with one scale per group along its contracted dimensions.

Pruning keeps a prefix of the leading axis and never re-quantizes: dequantizing a slice is slicing the dequantized.
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
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels.dequant_matmul import dequant_matmul, three_bit, tiling
from uniql_jax.pallas_kernels.embedding import embed as embed_packed
from uniql_jax.pallas_kernels.packing import SHIFTS, unpack_last
from uniql_jax.weights.runs import from_runs, scale_of_runs, scale_rows, to_runs

TARGET_GROUP = 128


def group_size(width: int, target: int = TARGET_GROUP, multiple: int = 8) -> int:
    """Weights that share a scale along a contracted width: the divisor of it nearest to `target`.

    Only multiples of `multiple` from target/2 to 2*target serve; a width without one gets `target` and a last group
    that is padded, and a width below target/2 is one padded group.

    Args:
        width: contracted weights.
        target: the size wanted.
        multiple: what a group must be a multiple of.

    Returns:
        Weights of a group.
    """
    if width <= target // 2:
        return -(-width // 8) * 8
    options = [g for g in range(multiple, 2 * target + 1, multiple) if width % g == 0 and g >= target // 2]
    return min(options, key=lambda g: (abs(math.log(g / target)), g)) if options else -(-target // multiple) * multiple


def as_stored(scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """Scales as a checkpoint holds them, exact in bfloat16, in their own dtype.

    A conversion to bfloat16 and back would be left out where XLA compiles for GPUs (`xla_allow_excess_precision`).
    """
    return jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=7)


def limits(bits: int) -> tuple[int, int]:
    """Smallest and largest integer of a grid; 8 bits are symmetric."""
    return -(2 ** (bits - 1)) + (bits == 8), 2 ** (bits - 1) - 1


@flax.struct.dataclass
class QuantizedArray:
    """Integers and scales of one weight.

    contract "last": the logical shape is [*lead, width], `data` is [*lead, words] and `scale` [*lead, groups].
    contract "first": the logical shape is [count, *inner, features] with count * prod(inner) contracted; `data` is
    [words, features] and `scale` [groups, features].
    With `run` > 1 groups lie inside one place of `inner`: `group` and `run` count entries of the leading axis, what is
    contracted is stored in the order [count / run, *inner, run], and `scale` is [ceil(count / group) * prod(inner),
    features] (runs.py).
    4 bits: `data` int32, eight weights a word in the order of SHIFTS, each stored as weight + 8 in 0..15.
    8 bits: `data` int8, one weight an element. A weight is integer * scale; scale is bfloat16.
    3 bits: of nested codes on a GPU, 0..7 for (integer - 3.75) * scale; groups of 128 in tiles alone (three_bit.py).

    `layout` "plain" is the above, and the only one on disk. 4 bits in groups of 128 may also be held as tiles that GPU
    kernels read faster, [major, minor, 2, 32, 4] (pallas_kernels/dequant_matmul/tiling.py): "rows" for contract "last",
    "groups" for "first". The sorted axis leads there too, so that pruning still keeps a prefix; `scale` never changes.
    """

    data: Any  # an integer array as above; Any, since jax.tree.map and jax.eval_shape may put anything into a pytree
    scale: Any
    bits: int = flax.struct.field(pytree_node=False)
    group: int = flax.struct.field(pytree_node=False)
    contract: str = flax.struct.field(pytree_node=False)
    width: int = flax.struct.field(pytree_node=False)  # contracted elements (unpadded)
    inner: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())  # contracted dims after the leading one
    layout: str = flax.struct.field(pytree_node=False, default="plain")
    run: int = flax.struct.field(pytree_node=False, default=1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape of the weight."""
        if self.contract == "last":
            return (*self.scale.shape[:-1], self.width)
        return (self.width // math.prod(self.inner), *self.inner, self.scale.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes held: integers and scales."""
        return int(self.data.nbytes + self.scale.nbytes)

    def take_prefix(self, count: int) -> QuantizedArray:
        """The first `count` entries of the leading axis, by contiguous slices of `data` and `scale`.

        Raises ValueError when the cut would split a group.
        """
        if self.contract == "last":
            if self.layout == "plain":
                data = self.data[:count]
            else:  # whole tiles; rows of the last one beyond the cut have no scale any more
                data = tiling.take_prefix(self.data, "last", count * math.prod(self.scale.shape[1:-1]))
            return dataclasses.replace(self, data=data, scale=self.scale[:count])
        inner = math.prod(self.inner)
        width = count * inner
        if count == self.shape[0]:
            return self
        if (count % self.run) if self.run > 1 else (width % self.group):
            what = f"run of {self.run}" if self.run > 1 else f"quantization group of {self.group}"
            raise ValueError(f"a cut at {count} splits a {what}")
        plain, per_word = self.layout == "plain", 8 if self.bits == 4 else 1
        data = self.data[: -(-width // (per_word if plain else self.group * tiling.SHAPES[self.bits][1]))]
        scale = self.scale[: scale_rows(count, inner, self.group, self.run)]
        return dataclasses.replace(self, data=data, scale=scale, width=width)

    def drop_prefix(self, count: int) -> QuantizedArray:
        """The entries behind the first `count`, in plain layout and without runs.

        Raises ValueError when the cut would split a group, or for another layout.
        """
        inner = 1 if self.contract == "last" else math.prod(self.inner)
        width = count * inner
        if self.layout != "plain" or self.run > 1 or (self.contract == "first" and width % self.group):
            raise ValueError(f"nothing is dropped before {count} of groups of {self.group}, {self.layout}")
        if self.contract == "last":
            return dataclasses.replace(self, data=self.data[count:], scale=self.scale[count:])
        data, scale = self.data[width // (8 if self.bits == 4 else 1) :], self.scale[width // self.group :]
        return dataclasses.replace(self, data=data, scale=scale, width=self.width - width)

    def in_runs(self) -> QuantizedArray:
        """The same weight with a scale for every run, whose groups are contiguous as kernels have them."""
        if self.run in (1, self.group):
            return self
        scale = scale_of_runs(self.scale, self.shape[0], math.prod(self.inner), self.group, self.run)
        return dataclasses.replace(self, scale=scale, group=self.run)

    def in_layout(self, layout: str) -> QuantizedArray:
        """The same weight held in another layout. Raises NotImplementedError for tiles that it does not fit.

        Arrays of numpy stay such: a model has hundreds of shapes at a rate, and none need be compiled for this.
        """
        if layout == self.layout:
            return self
        if isinstance(self.data, np.ndarray) and self.layout == "plain":
            return _tiled(self, layout)
        return _in_layout(self, layout)

    def dense(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
        """The weight as a dense array of its logical shape, computed in float32 and cast to `dtype`."""
        return _dense(self, jnp.dtype(dtype))

    def rows(self, x: Float[Array, "*b h"]) -> Float[Array, "*b out"]:
        """weight @ x over the last dimension, the weight's leading ones flattened."""
        data = self.data if self.layout != "plain" else self.data.reshape(-1, self.data.shape[-1])
        return self._product(x, data, self.scale.reshape(-1, self.scale.shape[-1]), "last")

    def columns(self, flat: Float[Array, "*b k"]) -> Float[Array, "*b h"]:
        """x @ weight, x flattened like the weight's leading dimensions."""
        stored = self.in_runs()
        flat = to_runs(flat, math.prod(self.inner), self.run, flat.ndim - 1)
        return stored._product(flat, stored.data, stored.scale, "first")

    def _product(self, x: Array, data: Any, scale: Any, contract: str) -> Array:
        options: dict[str, Any] = dict(bits=self.bits, group=self.group, width=self.width, layout=self.layout)
        return dequant_matmul(x, data, scale, contract=contract, **options)

    def lookup(self, index: Int[Array, "*b"], dtype: DTypeLike) -> Float[Array, "*b h"]:
        """Entries of the leading axis, as an embedding's are looked up; contract "last" in plain layout only."""
        data, scale = jnp.asarray(self.data), jnp.asarray(self.scale)
        if self.bits == three_bit.BITS:
            return three_bit.lookup(data, scale, index)[..., : self.width].astype(dtype)
        return embed_packed(index, data, scale, bits=self.bits, group=self.group, width=self.width, dtype=dtype)

    def tensors(self, name: str) -> Mapping[str, np.ndarray]:
        """What is stored of it, by tensor name."""
        return {f"{name}.data": np.asarray(self.data), f"{name}.scale": np.asarray(self.scale)}


@functools.partial(jax.jit, static_argnames="dtype")
def _dense(weight: QuantizedArray, dtype: np.dtype) -> Float[Array, "..."]:
    # Compiled as one: outside a jit, a dozen small programs per shape would be.
    if weight.bits == three_bit.BITS:
        dense = three_bit.dequantize(weight.data, weight.scale, weight.contract)[:, : weight.width]
        return (dense if weight.contract == "last" else dense.T).reshape(weight.shape).astype(dtype)
    weight = _plain(weight).in_runs()
    axis = -1 if weight.contract == "last" else 0
    values = unpack(weight.data, weight.bits, axis).astype(jnp.float32)
    scale = jnp.repeat(weight.scale.astype(jnp.float32), weight.group, axis=axis)
    dense = values * scale
    if weight.contract == "last":
        return dense[..., : weight.width].astype(dtype)
    dense = from_runs(dense[: weight.width], math.prod(weight.inner), weight.run)
    return dense.reshape(weight.shape).astype(dtype)


def _plain(weight: QuantizedArray) -> QuantizedArray:
    if weight.layout == "plain":
        return weight
    if weight.bits != 4:
        raise NotImplementedError(f"{weight.bits} bits come in tiles alone")
    lead = weight.scale.shape[:-1]
    rows = math.prod(lead) if weight.contract == "last" else weight.scale.shape[-1]
    data = tiling.untile(weight.data, weight.contract, rows)
    data = data.reshape(*lead, -1) if weight.contract == "last" else data
    return dataclasses.replace(weight, data=data, layout="plain")


@functools.partial(jax.jit, static_argnames="layout")
def _in_layout(weight: QuantizedArray, layout: str) -> QuantizedArray:
    weight = _plain(weight)
    return weight if layout == "plain" else _tiled(weight, layout)


def _tiled(weight: QuantizedArray, layout: str) -> QuantizedArray:
    if layout != tiling.LAYOUTS[weight.contract] or weight.bits != 4 or weight.group != tiling.GROUP:
        raise NotImplementedError(f"tiles {layout!r} hold no {weight.bits} bits in groups of {weight.group}")
    data = tiling.tile(weight.data.reshape(-1, weight.data.shape[-1]), weight.contract)
    return dataclasses.replace(weight, data=data, layout=layout)


def pack(values: Int[Array, "..."], bits: int, axis: int) -> Int[Array, "..."]:
    """Integers as they are stored.

    Args:
        values: integers in [-8, 7] (4 bits) or [-127, 127] (8 bits).
        bits: 4 or 8.
        axis: the axis to pack, whose length is a multiple of 8 at 4 bits.

    Returns:
        int32 words of eight weights along `axis` at 4 bits, int8 at 8 bits.
    """
    if bits == 8:
        return values.astype(jnp.int8)
    moved = jnp.moveaxis(values, axis, -1)
    words = (moved + 8).astype(jnp.uint32).reshape(*moved.shape[:-1], -1, 8)
    shifted = words << jnp.asarray(SHIFTS, jnp.uint32)
    packed = jax.lax.bitcast_convert_type(shifted.sum(-1, dtype=jnp.uint32), jnp.int32)
    return jnp.moveaxis(packed, -1, axis)


def unpack(data: Int[Array, "..."], bits: int, axis: int) -> Int[Array, "..."]:
    """Inverse of `pack`.

    Args:
        data: int32 words at 4 bits, int8 at 8 bits.
        bits: 4 or 8.
        axis: the packed axis.

    Returns:
        Signed integers, int32.
    """
    return jnp.moveaxis(unpack_last(jnp.moveaxis(data, axis, -1), bits), -1, axis).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("bits", "group", "contract", "shape", "run"))
def from_codes(
    codes: Int[Array, "rows width"],
    scale: Float[Array, "rows groups"],
    *,
    bits: int,
    group: int,
    contract: str,
    shape: tuple[int, ...],
    run: int = 1,
) -> QuantizedArray:
    """Assemble a packed weight.

    Args:
        codes: signed integers in logical order.
        scale: a scale for every group of a row; stored as bfloat16.
        bits: 4 or 8.
        group: contracted weights that share a scale.
        contract: "last" or "first": which dimensions of `shape` the columns of `codes` are.
        shape: the logical shape.
        run: entries of the leading axis that lie next to one another; 1 where groups span all between it and features.

    Returns:
        The weight in plain layout.
    """
    width = codes.shape[1]
    if run > 1:
        codes = to_runs(codes, math.prod(shape[1:-1]), run, 1)
    else:
        codes = jnp.pad(codes, ((0, 0), (0, scale.shape[1] * group - width)))
    scale = scale.astype(jnp.bfloat16)
    if contract == "last":
        lead = shape[:-1]
        data = pack(codes, bits, -1)
        return QuantizedArray(
            data.reshape(*lead, -1), scale.reshape(*lead, -1), bits=bits, group=group, contract=contract, width=width
        )
    data, inner = pack(codes.T, bits, 0), shape[1:-1]
    return QuantizedArray(data, scale.T, bits=bits, group=group, contract=contract, width=width, inner=inner, run=run)
