"""Arrays from a device's memory into the host's, at the speed of the bus."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

PINNED = "pinned_host"
SMALL = 2**20
"""Bytes up to which the detour would take longer than it saves."""


def to_host(tree: Any) -> Any:
    """A pytree of arrays as NumPy arrays; what a device held is copied, and nothing else holds or changes the copy.

    NumPy alone reads a GPU's arrays at a small part of the bus's speed, however many threads ask. The device writes to
    pinned memory at all of it, and threads copy on from there. Pinned memory is given back at once: its pool, which
    grows by doubling, stays as large as what is copied at a time.
    """
    return jax.tree.map(_copied, tree)


def _copied(value: Any) -> np.ndarray:
    if not isinstance(value, jax.Array):
        return np.asarray(value)
    if value.nbytes > SMALL and writes_pinned(next(iter(value.sharding.device_set))):
        value = jax.block_until_ready(jax.device_put(value, value.sharding.with_memory_kind(PINNED)))
    return np.array(value)


def writes_pinned(device: jax.Device) -> bool:
    """Whether a device has memory of its own, and reaches pinned memory of the host."""
    return device.platform != "cpu" and any(memory.kind == PINNED for memory in device.addressable_memories())
