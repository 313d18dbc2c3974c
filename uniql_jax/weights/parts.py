"""One device's part of a leaf, taken from an array of the host or of a file in the form in which it is stored.

Integers are never rounded anew: rows are taken as they are, and what a group contracts is taken word by word, or
repacked where a word holds entries of two devices.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, Shaped

from uniql_jax import elastic
from uniql_jax.pallas_kernels.packing import SHIFTS
from uniql_jax.weights.quantized import QuantizedArray
from uniql_jax.weights.split import Split, split_dim

ZEROS = -0x77777778
"""A word of eight zeros: each is stored as 8."""


def part_of(leaf: elastic.Leaf, value: Any, split: Split, device: int) -> Any:
    """The part of a leaf that a device has.

    Args:
        leaf: the row of `elastic.BLOCKS` or `elastic.TOP` that describes it.
        value: all of it that is kept: an array with numpy's `take`, or a packed weight of such in plain layout.
        split: who has what.
        device: number of the device.

    Returns:
        Arrays of numpy; all of the leaf where it is not shared out.
    """
    dim = split_dim(leaf)
    if dim is None:
        read = np.asarray
        if isinstance(value, QuantizedArray):
            return dataclasses.replace(value, data=read(value.data), scale=read(value.scale))
        return read(value)
    axis = leaf.dims.index(dim)
    index = split.index(dim, device, value.shape[axis])
    if not isinstance(value, QuantizedArray):
        return _take(value, index, axis)
    if value.contract == "last":
        return dataclasses.replace(value, data=_take(value.data, index, axis), scale=_take(value.scale, index, axis))
    return _contracted(value, index)


def part_like(leaf: elastic.Leaf, like: Any, split: Split) -> Any:
    """`part_of` for jax.ShapeDtypeStructs in place of arrays: what every device has of a leaf."""

    def empty(one: Any) -> np.ndarray:
        return np.broadcast_to(np.zeros((), one.dtype), one.shape)

    part = part_of(leaf, jax.tree.map(empty, like), split, 0)
    return jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype), part)


def _contracted(value: QuantizedArray, index: Int[np.ndarray, " n"]) -> QuantizedArray:
    """A part of a packed weight that contracts its leading dimensions, along the heads, or else the first."""
    per_word = 8 if value.bits == 4 else 1
    if not value.inner:  # entries come in whole groups
        groups = index[:: value.group] // value.group
        positions = (groups[:, None] * value.group + np.arange(value.group)).reshape(-1)
        positions = np.where(np.repeat(groups, value.group) < 0, -1, positions)
        data, scale = _take_packed(value.data, positions, value.bits), _take(value.scale, groups, 0)
        return dataclasses.replace(value, data=data, scale=scale, width=len(index))
    inner, count = value.inner[0], value.shape[0]
    width, taken = count * len(index), index[None, :, None]
    if value.run > 1:  # stored [count / run, heads, run], with groups that lie inside a head
        block, entry = np.arange(count // value.run)[:, None, None], np.arange(value.run)[None, None]
        positions = (block * inner + taken) * value.run + entry
        groups = np.arange(value.scale.shape[0] // inner)[:, None] * inner + index[None]
        scale = _take(value.scale, np.where(index[None] < 0, -1, groups).reshape(-1), 0)
        group = value.group
    else:  # stored [count, heads]: a group spans all heads, so that every device has a part of each
        entries = value.data.shape[0] * per_word // inner
        positions = np.arange(entries)[:, None, None] * inner + taken
        scale, group = np.asarray(value.scale), value.group // inner * len(index)
    positions = np.where(taken < 0, -1, positions).reshape(-1)
    data = _take_packed(value.data, positions, value.bits)
    return dataclasses.replace(value, data=data, scale=scale, group=group, width=width, inner=(len(index),))


def _take(value: Any, index: Int[np.ndarray, " n"], axis: int, fill: int = 0) -> Shaped[np.ndarray, "..."]:
    """Entries along an axis; `fill` where the index is -1. Nothing else is read."""
    there = index >= 0
    found = np.asarray(value.take(index[there], axis))
    if there.all():
        return found
    out = np.full((*value.shape[:axis], len(index), *value.shape[axis + 1 :]), fill, value.dtype)
    out[(slice(None),) * axis + (there,)] = found
    return out


def _take_packed(data: Any, positions: Int[np.ndarray, " n"], bits: int) -> Int[np.ndarray, "words features"]:
    """Packed integers at these positions of the packed axis, which leads; zeros where a position is -1."""
    if bits != 4:
        return _take(data, positions, 0)
    eights = positions.reshape(-1, 8)
    first = eights[:, :1]
    whole = (eights == first + np.arange(8)) & (first % 8 == 0) & (first >= 0)
    if (whole.all(1) | (eights < 0).all(1)).all():
        return _take(data, np.where(first[:, 0] < 0, -1, first[:, 0] // 8), 0, ZEROS)
    needed = np.unique(positions[positions >= 0] // 8)
    shifts = np.asarray(SHIFTS, np.int32)[:, None]
    codes = (np.asarray(data.take(needed, 0))[:, None] >> shifts & 0xF).reshape(len(needed) * 8, -1)
    where = np.searchsorted(needed, np.maximum(positions, 0) // 8) * 8 + positions % 8
    chosen = np.where((positions < 0)[:, None], 8, codes[np.where(positions < 0, 0, where)]).astype(np.uint32)
    shifted = chosen.reshape(-1, 8, chosen.shape[-1]) << shifts.astype(np.uint32)
    return np.bitwise_or.reduce(shifted, axis=1).view(np.int32)
