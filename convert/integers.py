"""The integers and scales of packed weights as plain arrays, and blocks of a fixed length that exporters cut them into.

Other runtimes share one scale among a fixed number of neighbouring weights. A group of ours whose size is no multiple
of that is followed by zeros up to the next one, so that every integer keeps its own scale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from uniql_jax.config import ModelConfig
from uniql_jax.convert import tables
from uniql_jax.convert.full_size import full_size
from uniql_jax.pallas_kernels.packing import SHIFTS
from uniql_jax.weights.quantized import QuantizedArray
from uniql_jax.weights.runs import from_runs

MOST = 2.0
"""A dimension grows by no more than this factor; beyond it, zeros would cost more than a wider number format."""


def integers(weight: QuantizedArray) -> Int[np.ndarray, "..."]:
    """The integers of a packed weight in its logical shape, int8.

    Args:
        weight: 4 or 8 bits, in plain layout.
    """
    data = np.asarray(weight.data)
    last = weight.contract == "last"
    if weight.bits == 4:
        codes = np.empty((*data.shape, 8) if last else (data.shape[0], 8, *data.shape[1:]), np.int8)
        for k, shift in enumerate(SHIFTS):
            codes[(..., k) if last else (slice(None), k)] = ((data >> shift) & 15) - 8
        data = codes.reshape((*data.shape[:-1], -1) if last else (-1, *data.shape[1:]))
    kept = data[..., : weight.width] if last else data[: weight.width]
    return from_runs(kept, math.prod(weight.inner), weight.run).reshape(weight.shape)


def scales(weight: QuantizedArray) -> Float[np.ndarray, "..."]:
    """The scales of a packed weight, float32.

    Returns:
        [*lead, groups] for the contraction "last"; for "first" [groups, f], or with runs [groups, *inner, f].
    """
    found = np.asarray(weight.scale).astype(np.float32)
    return found.reshape(-1, *weight.inner, found.shape[-1]) if weight.run > 1 else found


def foreign(
    config: ModelConfig, kind: str, row: tables.Row, values: Mapping[str, Shaped[np.ndarray, "..."]], inv_freq: Any
) -> Shaped[np.ndarray, "..."]:
    """The leaves of one tensor in another runtime's layout, zeros for what was cut; their scales as well.

    Args:
        config: sizes of what is written: a dimension that a value has one entry a group of has that many.
        kind: of the block, "top" outside the layers.
        row: the tensor.
        values: its leaves at their kept sizes.
        inv_freq: of the block, where it rotates: it says where kept pairs belong.
    """
    leaves = dict(values)
    if kind != "top":
        order = {} if inv_freq is None else {"inv_freq": np.asarray(inv_freq)}
        leaves = full_size(config, kind, order | leaves)
    return tables.from_leaves(config, row, leaves)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a contracted dimension of `width` entries in groups of `group` is laid out in blocks of `size` entries."""

    width: int
    group: int
    size: int = 32
    spare: bool = False
    """Whether the last entry must be one of the zeros."""

    @classmethod
    def none(cls, width: int) -> Blocks:
        """A dimension that no blocks are laid along."""
        return cls(width, 1)

    @property
    def step(self) -> int:
        """Entries from the start of one group to the start of the next; `group` where padding does not pay."""
        padded = -(-self.group // self.size) * self.size
        return padded if padded <= MOST * self.group else self.group

    @property
    def exact(self) -> bool:
        """Whether no block spans two groups."""
        return self.step % self.size == 0

    @property
    def total(self) -> int:
        """Entries with the zeros."""
        if not self.exact:
            return self.width
        last = (self.width - 1) // self.group
        end = last * self.step + self.width - last * self.group
        return -(-(end + self.spare) // self.size) * self.size

    def pad(self, values: Shaped[np.ndarray, "..."], axis: int) -> Shaped[np.ndarray, "..."]:
        """Values along the dimension, or its first ones, with zeros between the groups and behind."""
        if self.total == values.shape[axis]:
            return values
        entry = np.arange(values.shape[axis])
        out = np.zeros((*values.shape[:axis], self.total, *values.shape[axis + 1 :]), values.dtype)
        out[(slice(None),) * axis + (entry // self.group * self.step + entry % self.group,)] = values
        return out

    def per_block(self, scale: Shaped[np.ndarray, "..."], axis: int) -> Shaped[np.ndarray, "..."]:
        """The scale of every block from those of the groups."""
        group = np.arange(0, self.total, self.size) // self.step
        return np.take(scale, np.minimum(group, scale.shape[axis] - 1), axis=axis)
