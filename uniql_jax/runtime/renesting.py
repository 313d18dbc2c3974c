"""Leaves of nested codes at another setting of the joint plan: bits and units are dropped in memory, or read and added.

A leaf holds its first entries in 4-bit words and the others in planes of their leading bits. Entries that lose their
last bit move from words to planes, for which only their coarser scales are read; entries that win it are read their
last bits and finer scales. All of it is numpy's work, so that nothing is compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from uniql_jax import elastic
from uniql_jax.checkpoint import Checkpoint
from uniql_jax.checkpoint_leaves import assembled
from uniql_jax.joint_plan import Kept
from uniql_jax.pallas_kernels.dequant_matmul.three_bit import BITS
from uniql_jax.runtime.choice import Choice
from uniql_jax.runtime.loading import in_form
from uniql_jax.weights.mixed import MixedArray, in_planes
from uniql_jax.weights.nested import NestedArray, leading_planes
from uniql_jax.weights.quantized import QuantizedArray

PACKED = (QuantizedArray, NestedArray, MixedArray)
Join = Callable[[Sequence[np.ndarray]], np.ndarray]


def has_planes(params: Any) -> bool:
    """Whether some weight has entries of fewer bits."""
    leaves = jax.tree.leaves(params, is_leaf=lambda value: isinstance(value, PACKED))
    return any(isinstance(leaf, PACKED) and held(leaf).full < leaf.shape[0] for leaf in leaves)


def held(value: Any) -> Kept:
    """Entries of a leaf, and how many of them have all bits."""
    if isinstance(value, MixedArray):
        return Kept(value.shape[0], value.whole.shape[0])
    bits = isinstance(value, NestedArray) or (isinstance(value, QuantizedArray) and value.bits == BITS)
    return Kept(value.shape[0], 0 if bits else value.shape[0])  # in planes, or in tiles of them


def renest(checkpoint: Checkpoint, params: dict[str, Any], size: Choice, i: int | None, dtype: Any, join: Join) -> None:
    """Bring layer i, or with None what is outside the layers, to a size, in place, one leaf after another.

    An interrupted call is finished by another one: each leaf says itself what it holds.

    Args:
        checkpoint: what the leaves are of.
        params: the model's.
        size: wanted.
        i: the layer.
        dtype: of dense weights.
        join: puts arrays of numpy together along their leading axis, in new memory that JAX takes as it is.
    """
    if i is None:
        for name in ("embed", "head"):
            if name in params:
                want = size.kept_top(checkpoint, name)
                params[name] = _changed(checkpoint, name, elastic.TOP[name], params[name], want, dtype, join)
        return
    kept = size.kept(checkpoint)[i]
    for kind, block in params["layers"][i].items():
        for name, value in block.items():
            leaf = elastic.BLOCKS[kind][name]
            if leaf.axis is not None:
                full = f"layers.{i}.{kind}.{name}"
                block[name] = _changed(checkpoint, full, leaf, value, kept[leaf.axis], dtype, join)


def _changed(
    checkpoint: Checkpoint, name: str, leaf: elastic.Leaf, value: Any, want: Kept, dtype: Any, join: Join
) -> Any:
    """A leaf with other entries and bits, on the device."""
    have, packed = held(value), isinstance(value, PACKED)
    if have == want or (not packed and have.entries == want.entries):
        return value
    if packed:
        found = _recoded(checkpoint, name, leaf, in_planes(value), have, want, join)
    else:
        rest = _vector(checkpoint, name, have.entries, want.entries)
        found = join([np.asarray(value)[: want.entries], *rest])
    # jnp.asarray would compile a program for each shape
    return jax.device_put(in_form(leaf, found, dtype, name != "embed", name))


def _vector(checkpoint: Checkpoint, name: str, start: int, stop: int) -> list[np.ndarray]:
    if stop <= start:
        return []
    _, _, kind, leaf = name.split(".")
    axis = str(elastic.BLOCKS[kind][leaf].axis)
    found = checkpoint.suffix(int(name.split(".")[1]), kind, leaf, {axis: start}, {axis: stop})
    return [np.asarray(found, np.float32)]


def _recoded(
    checkpoint: Checkpoint, name: str, leaf: elastic.Leaf, value: Any, have: Kept, want: Kept, join: Join
) -> Any:
    """Words of the first entries and planes of the others, from what is held and what is read."""

    def read(part: str, start: int, stop: int) -> np.ndarray:
        return checkpoint.part(name, leaf, part, start, stop)

    def nested(leading: np.ndarray, start: int, stop: int, whole: bool) -> NestedArray:
        """Entries whose leading bits are there: with last bits where `whole`."""
        coarse = read("fine" if whole else "coarse", start, stop)
        last, fine = (read("last", start, stop), coarse) if whole else (leading[:0, 0], coarse[:0])
        if not whole and leaf.contract == "last":
            last = leading[:0, ..., 0, :]
        parts = {"leading": leading, "last": last, "fine": fine, "coarse": coarse}
        return assembled(checkpoint.config, checkpoint.meta, leaf, parts, {leaf.dims[0]: stop - start})  # type: ignore[return-value]

    whole, rest = _parts(value)
    stays = min(have.full, want.full)
    words = [whole.take_prefix(stays)] if stays and whole is not None else []
    planes = []
    if want.full < have.full and (stop := min(have.full, want.entries)) > want.full:
        assert whole is not None
        lost = whole.take_prefix(stop).drop_prefix(want.full)
        planes.append(nested(leading_planes(lost), want.full, stop, False))
    if (stop := min(have.entries, want.full)) > have.full:
        assert rest is not None
        words.append(nested(rest.take_prefix(stop - have.full).leading, have.full, stop, True).packed())
    if want.full > (start := max(have.entries, have.full)):
        words.append(nested(read("leading", start, want.full), start, want.full, True).packed())
    start, stop = max(have.full, want.full), min(have.entries, want.entries)
    if stop > start:
        assert rest is not None
        planes.append(rest.take_prefix(stop - have.full).drop_prefix(start - have.full))
    if want.entries > (start := max(have.entries, want.full)):
        planes.append(nested(read("leading", start, want.entries), start, want.entries, False))
    if not planes:
        return _joined(words, join)
    return MixedArray(_joined(words, join), _joined(planes, join)) if words else _joined(planes, join)


def _parts(value: Any) -> tuple[QuantizedArray | None, NestedArray | None]:
    if isinstance(value, MixedArray):
        return value.whole, value.rest
    return (value, None) if isinstance(value, QuantizedArray) else (None, value)


def _joined(parts: Sequence[Any], join: Join) -> Any:
    """Weights of one kind as one, along the leading axis."""
    one = parts[0]
    arrays = {
        field.name: join([getattr(part, field.name) for part in parts])
        for field in dataclasses.fields(one)
        if isinstance(getattr(one, field.name), np.ndarray)
    }
    width = sum(part.width for part in parts) if one.contract == "first" else one.width
    return dataclasses.replace(one, **arrays, width=width)
