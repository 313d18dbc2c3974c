"""A model on several devices: which entries of every named dimension each device has (tensor parallelism).

Heads, with what belongs to them, and the vocabulary are shared out in runs. MLP channels are sorted, so they are dealt
out unit by unit: whatever is kept, every device then keeps a prefix of what it has. Where entries do not divide among
the devices, some get zeros to fill up, which add nothing to any sum.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from uniql_jax import elastic
from uniql_jax.config import ModelConfig
from uniql_jax.errors import UserError

AXIS = "model"
"""The axis of the mesh."""
SPLIT = ("ffn", "head", "kv_head", "mamba_head", "mamba_group", "vocab")
"""Dimensions of `elastic.BLOCKS` that are shared out; a leaf has one of them at most."""
GROUPED = {"head": "kv_head", "mamba_head": "mamba_group"}
"""Heads, and what a run of them shares."""


def device_mesh(devices: int | Mesh) -> Mesh:
    """A mesh of one axis over the first so many devices, or over those of another mesh.

    Raises:
        UserError: there are not so many devices.
    """
    if isinstance(devices, Mesh):
        return Mesh(devices.devices.reshape(-1), (AXIS,))
    found = jax.devices()
    if not 1 <= devices <= len(found):
        raise UserError(f"cannot share a model among {devices} devices: JAX sees {len(found)} here")
    return Mesh(np.asarray(found[:devices]), (AXIS,))


@dataclasses.dataclass(frozen=True)
class Split:
    """How a model is shared out among the devices of a mesh.

    `unit` counts MLP channels that stay together: whole quantization groups. `heads` and `mamba_heads` are what the
    number of heads on a device must be a multiple of, so that its part of a quantization group fills whole words.
    """

    mesh: Mesh | AbstractMesh
    config: ModelConfig
    unit: int = 1
    heads: int = 1
    mamba_heads: int = 1

    @property
    def count(self) -> int:
        """How many devices."""
        return self.mesh.size

    @property
    def stacked(self) -> NamedSharding:
        """Where an array lies whose first axis counts devices."""
        return NamedSharding(self.mesh, PartitionSpec(AXIS))

    @property
    def replicated(self) -> NamedSharding:
        """Where an array lies that every device has."""
        return NamedSharding(self.mesh, PartitionSpec())

    def sharing(self, dim: str) -> int:
        """How many devices share one entry of `kv_head` or `mamba_group`, each with some of its heads."""
        return max(1, self.count // max(1, elastic.sizes(self.config)[dim]))

    @functools.cached_property
    def local(self) -> dict[str, int]:
        """Entries of the dimensions of heads that a device has, fillings included."""
        full, found = elastic.sizes(self.config), {}
        for heads, groups in GROUPED.items():
            if full[groups]:
                multiple = self.heads if heads == "head" else self.mamba_heads
                found[groups] = -(-full[groups] // self.count)
                each = -(-(full[heads] // full[groups]) // self.sharing(groups))
                while found[groups] * each % multiple:
                    each += 1
                found[heads] = found[groups] * each
        return found

    def index(self, dim: str, device: int, size: int) -> Int[np.ndarray, " local"]:
        """Which entries of a dimension a device has, in their order there; -1 is a filling.

        Args:
            dim: one of `SPLIT`.
            device: its number in the mesh.
            size: entries that there are: the kept ones for `ffn`, all of any other.
        """
        if dim == "ffn":
            units = device + self.count * np.arange(math.ceil(math.ceil(size / self.unit) / self.count))
            found = (units[:, None] * self.unit + np.arange(self.unit)).reshape(-1)
            return np.where(found < size, found, -1)
        if dim == "vocab":
            each = -(-size // self.count)
            found = device * each + np.arange(each)
            return np.where(found < size, found, -1)
        if dim in GROUPED:
            return self._heads(dim, device, size)
        each, sharing = self.local[dim], self.sharing(dim)
        found = device // sharing * each + np.arange(each)
        return np.where(found < size, found, -1)

    def _heads(self, dim: str, device: int, size: int) -> Int[np.ndarray, " local"]:
        groups, total = GROUPED[dim], elastic.sizes(self.config)[GROUPED[dim]]
        own = self.index(groups, device, total)[:, None]
        whole, each, sharing = size // total, self.local[dim] // len(own), self.sharing(groups)
        # Devices that share a group take its heads in runs, as even as they can be.
        run = -(-whole // sharing)
        within = device % sharing * run + np.arange(each)[None]
        taken = (np.arange(each)[None] < run) & (within < whole) & (own >= 0)
        return np.where(taken, own * whole + within, -1).reshape(-1)

    def kept(self, count: Any, device: Any) -> Any:
        """How many of the first `count` MLP channels a device has; both may be traced, and NumPy's or JAX's."""
        units, rest = count // self.unit, count % self.unit
        whole = self.unit * ((units - device + self.count - 1) // self.count)
        return whole + rest * (units % self.count == device)

    def part_config(self) -> ModelConfig:
        """What a device computes with: the sizes of its part."""
        local, ssm = self.local, self.config.ssm
        found = dataclasses.replace(self.config, heads=local.get("head", 0), kv_heads=local.get("kv_head", 0), ssm=ssm)
        if ssm is None:
            return found
        width, sharing = ssm.head_dim * ssm.heads // ssm.groups, self.sharing("mamba_group")
        part = dataclasses.replace(
            ssm,
            heads=local["mamba_head"],
            groups=local["mamba_group"],
            norm_width=width,
            norm_devices=(AXIS, sharing) if sharing > 1 else None,
        )
        return dataclasses.replace(found, ssm=part)

    def whole_config(self) -> ModelConfig:
        """The sizes of all parts next to one another, fillings and copies included, which caches have."""
        part, count = self.part_config(), self.count
        ssm = part.ssm and dataclasses.replace(part.ssm, heads=part.ssm.heads * count, groups=part.ssm.groups * count)
        return dataclasses.replace(part, heads=part.heads * count, kv_heads=part.kv_heads * count, ssm=ssm)


def split_of(
    config: ModelConfig, mesh: Mesh | AbstractMesh, groups: Mapping[str, int], runs: Mapping[str, int], unit: int
) -> Split:
    """How a checkpoint is shared out.

    Args:
        config: the model.
        mesh: its devices.
        groups: quantization group by elastic axis; empty where weights are not packed.
        runs: see QuantizedArray, by elastic axis.
        unit: MLP channels that stay together where they are in no group.
    """
    full = elastic.sizes(config)

    def multiple(axis: str, heads: str) -> int:
        if axis not in groups or axis in runs:
            return 1
        return 8 // math.gcd(8, groups[axis] // full[heads])

    return Split(mesh, config, groups.get("ffn", unit), multiple("vo", "head"), multiple("ssm_head", "mamba_head"))


def split_dim(leaf: elastic.Leaf) -> str | None:
    """The dimension along which a leaf is shared out; None: every device has all of it."""
    return next((dim for dim in leaf.dims if dim in SPLIT), None)
