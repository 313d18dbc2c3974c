"""What a run may take of device, host and disk, and how it is laid out to stay within: batch size, where streams go."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from uniql_jax import console
from uniql_jax.compression.devices import AHEAD
from uniql_jax.compression.estimate import disk_bytes, memory_parts, stream_bytes
from uniql_jax.compression.settings import RECOVER_LENGTH, CompressionSettings, Resources
from uniql_jax.config import ModelConfig
from uniql_jax.errors import UserError
from uniql_jax.train.placement import data_mesh, host_bytes, memory_bytes
from uniql_jax.train.settings import RecoverySettings, resolved

SHARE = 0.9
"""Of a device's memory that is planned for: allocators need room."""
HOST_BASE = {"cpu": 2**30, "gpu": 23 * 2**28}
"""What Python, JAX and the compiled programs take of the host."""
HOST_DEVICE = 3 * 2**30
"""What every GPU beyond the first takes of it (compress-*-two-h200.json)."""
TRAINING_PROGRAMS = 2200 * 10**6
"""What the programs of training take of a GPU's host in addition, while they compile (compress-*-recover-h200.json)."""
RUNNING = 4
"""Streams in memory in addition to those that are held: values before a layer, gradients before and after it, and one
on its way to the disk; one more where the unpruned model runs along, and where nested codes have a second model."""
HELD = 0.8
"""Of what is left of a device's memory, the share that holds streams: freed pieces do not always fit."""
BATCHES = (8192, 4096, 2048, 1024, 512, 256, 128)
"""Tokens of a batch, the largest that fits is taken; a CPU gains nothing above CPU_BATCH."""
CPU_BATCH = 4096


class Budget(NamedTuple):
    """How a run is laid out, and the bytes it is expected to take.

    batch_tokens: tokens of calibration windows worked on at a time. interval: every how many layers a stream is written
    to disk. held: bytes of other streams that are kept in memory. parked: whether streams are in the host's memory
    rather than the devices'. devices: how many work. device, host: what is in the memory of one, and
    the host's, at a time, by what it is for; a CPU has one memory.
    """

    batch_tokens: int
    interval: int
    held: int
    parked: bool
    devices: int
    device: dict[str, int]
    host: dict[str, int]
    disk: int


def available_host() -> int:
    """Bytes of memory that this machine can still give."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 8 * 2**30


def device_limit() -> int | None:
    """Bytes that the allocator of the first device may give; None where it does not say, as on CPUs."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def lay_out(
    config: ModelConfig,
    settings: CompressionSettings,
    resources: Resources,
    shape: tuple[int, ...],
    training: Sequence[RecoverySettings] = (),
    training_length: int = RECOVER_LENGTH,
    free_disk: int | None = None,
) -> Budget:
    """The layout of a run with calibration windows of this shape [windows, length] that stays within its limits.

    Args:
        config: the model.
        settings: of the run.
        resources: its limits.
        shape: windows and tokens of each.
        training: how it recovers, and how it trains on after quantizing, if it does.
        training_length: tokens of a training example.
        free_disk: bytes; streams are computed again rather than written where they would not fit.

    Raises:
        UserError: when no layout does, with what the smallest would take.
    """
    tokens, count = shape[0] * shape[1], len(config.pattern)
    for each in training:
        _require_training(config, resolved(each, config), training_length, resources)
    one = stream_bytes(config, settings, tokens)
    memory = _memory(config, settings, resources, shape[1], one, training)
    most = min(resources.max_disk or sys.maxsize, free_disk or sys.maxsize)
    room, wanted = memory.held, one * (count + 1)
    # Where memory holds all streams, the disk's are for a killed run alone, and a GPU is sooner done with a layer than
    # a disk with its stream.
    rare = memory.device and room >= wanted
    interval = resources.stream_interval or max(1, -(-count // 3) if rare else math.isqrt(count))
    if resources.stream_interval is None:
        # Streams between two on disk are computed again together, so memory must hold them.
        interval = max(1, min(interval, room // max(1, one)))
        rarer = range(interval, max(interval, min(count, room // max(1, one))) + 1)
        interval = next((i for i in rarer if disk_bytes(config, settings, i, tokens, training) <= most), interval)
    disk = disk_bytes(config, settings, interval, tokens, training)
    if resources.max_disk and disk > resources.max_disk:
        raise UserError(
            f"the pass needs {console.format_bytes(disk)} of disk, --max-disk allows "
            f"{console.format_bytes(resources.max_disk)}"
        )
    # Where not all can be held, those that are computed again need their place; when they do, most others are gone.
    again = 0 if room >= wanted else (interval - 1) * one
    held = min(wanted, max(0, room - again))
    place = memory.host if memory.parked or not memory.device else memory.device
    place["held streams"] = max(held, again) // (memory.devices if place is memory.device else 1)
    return Budget(memory.batch_tokens, interval, held, memory.parked, memory.devices, memory.device, memory.host, disk)


class _Memory(NamedTuple):
    """Where what goes: bytes on device and host, and what is left for streams that are held."""

    batch_tokens: int
    parked: bool
    devices: int
    device: dict[str, int]
    host: dict[str, int]
    held: int


def _memory(
    config: ModelConfig,
    settings: CompressionSettings,
    resources: Resources,
    length: int,
    one: int,
    training: Sequence[RecoverySettings],
) -> _Memory:
    """The largest batches that fit, and streams on the device if it has the room.

    one: bytes of a stream. UserError when limits were given and nothing fits, and for more devices than there are.
    """
    total, devices = device_limit(), len(jax.local_devices()[: resources.devices])
    if resources.devices is not None and resources.devices > devices:
        raise UserError(f"--devices {resources.devices}: this machine has {devices}")
    host = min(resources.max_host_memory or available_host(), available_host())
    unpruned = settings.refit is not None or settings.reconstruct > 0
    streams = (RUNNING + settings.nested + unpruned) * one
    if total is None:
        room = host - HOST_BASE["cpu"] - streams
    else:
        room = int(SHARE * min(resources.max_device_memory or total, total))
    usual = (size for size in BATCHES if size >= length and (total is not None or size <= CPU_BATCH))
    batch, parts = 0, {}
    for batch in (resources.batch_tokens,) if resources.batch_tokens else (*usual, length):
        parts = memory_parts(config, settings, length, batch)
        if sum(parts.values()) <= room:
            break
    left = room - sum(parts.values())
    limited = bool(resources.max_device_memory or resources.max_host_memory)
    if total is None:
        _require(limited, "host", host - left, host)
        base = {"programs": HOST_BASE["cpu"], **parts, "streams": streams}
        return _Memory(batch, False, devices, {}, base, max(0, left))
    _require(limited, "device", room - left, room)
    base = {"programs": HOST_BASE["gpu"] + (devices - 1) * HOST_DEVICE, "layers": parts["layers"]}
    if training:
        base["training"] = TRAINING_PROGRAMS + max(host_bytes(config, each) for each in training)
    share = streams // devices
    if HELD * (left - share) * devices >= one:
        base["streams"] = 2 * stream_bytes(config, settings, batch)  # on their way to the disk
        _require(limited, "host", sum(base.values()), host)
        return _Memory(batch, False, devices, parts | {"streams": share}, base, int(HELD * (left - share)) * devices)
    base["streams"] = streams
    _require(limited, "host", sum(base.values()), host)
    # Up to two parts of a batch come, and one goes.
    parts["batches on their way"] = 3 * AHEAD * stream_bytes(config, settings, batch)
    _require(limited, "device", sum(parts.values()), room)
    return _Memory(batch, True, devices, parts, base, max(0, host - sum(base.values())))


def _require_training(config: ModelConfig, options: RecoverySettings, length: int, resources: Resources) -> None:
    """UserError where a limit was given and training needs more."""
    total = device_limit()
    most = resources.max_host_memory if total is None else resources.max_device_memory
    need = memory_bytes(config, options, length, data_mesh(options.batch // options.accumulate).size)
    if most is not None and need > most:
        raise UserError(
            f"recovery needs about {console.format_bytes(need)} of {'host' if total is None else 'device'} memory, "
            f"{console.format_bytes(most)} may be used: a smaller --recover-rank, --recover-batch or --recover-length "
            "needs less"
        )


def _require(limited: bool, what: str, need: int, most: int) -> None:
    """UserError where a limit was given and more is needed."""
    if limited and need > most:
        raise UserError(
            f"the pass needs about {console.format_bytes(need)} of {what} memory for a layer of this model and the "
            f"calibration windows, {console.format_bytes(most)} may be used: fewer or shorter windows "
            "(--calib-windows, --calib-length) need less"
        )
