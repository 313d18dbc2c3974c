"""What a run may take of device, host and disk, and how it is laid out to stay within: batch size, where streams go."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import NamedTuple

import jax

from uniql_jax import console
from uniql_jax.compression.estimate import disk_bytes, memory_parts, stream_bytes
from uniql_jax.compression.settings import CompressionSettings, Resources
from uniql_jax.config import ModelConfig
from uniql_jax.errors import UserError

SHARE = 0.9
"""Of a device's memory that is planned for: allocators need room."""
HOST_BASE = 2 * 2**30
"""What Python, JAX and the compiled programs take of the host."""
BATCHES = (16384, 8192, 4096, 2048, 1024, 512, 256, 128)
"""Tokens of a batch, the largest that fits is taken; a CPU gains nothing above CPU_BATCH."""
CPU_BATCH = 4096


class Budget(NamedTuple):
    """How a run is laid out, and the bytes it is expected to take.

    batch_tokens: tokens of calibration windows worked on at a time. interval: every how many layers a stream is written
    to disk. device_streams, host_streams: bytes of other streams held there.
    """

    batch_tokens: int
    interval: int
    device_streams: int
    host_streams: int
    device: dict[str, int]
    host: int
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
    tuned: bool = False,
    free_disk: int | None = None,
) -> Budget:
    """The layout of a run with calibration windows of this shape [windows, length] that stays within its limits.

    Args:
        config: the model.
        settings: of the run.
        resources: its limits.
        shape: windows and tokens of each.
        tuned: whether it trains on after quantizing.
        free_disk: bytes; streams are computed again rather than written where they would not fit.

    Raises:
        UserError: when no layout does, with what the smallest would take.
    """
    windows, length = shape
    one = stream_bytes(config, settings, windows * length)
    count = len(config.pattern)
    total = device_limit()
    host = min(resources.max_host_memory or available_host(), available_host())
    device = host if total is None else int(SHARE * min(resources.max_device_memory or total, total))
    if resources.batch_tokens is not None:
        sizes: tuple[int, ...] = (resources.batch_tokens,)
    else:
        sizes = tuple(size for size in BATCHES if total is not None or size <= CPU_BATCH)
        sizes = tuple(size for size in sizes if size >= length) or (length,)
    batch, parts = 0, {}
    for batch in sizes:
        parts = memory_parts(config, settings, windows, length, batch)
        if sum(parts.values()) <= device:
            break
    needed = sum(parts.values())
    if needed > device and (resources.max_device_memory or resources.max_host_memory):
        raise UserError(
            f"the pass needs about {console.format_bytes(needed)} of memory for a layer of this model, "
            f"{console.format_bytes(device)} may be used: fewer or shorter windows (--calib-windows, --calib-length) "
            "need less"
        )
    base = HOST_BASE + 3 * parts["one layer"]
    on_device = max(0, device - needed)
    on_host = 0 if total is None else max(0, host // 2 - base)
    wanted = one * (count + 1)
    on_device, on_host = min(on_device, wanted), min(on_host, max(0, wanted - on_device))
    most = min(resources.max_disk or sys.maxsize, free_disk or sys.maxsize)
    interval = resources.stream_interval or max(1, math.isqrt(count))
    if resources.stream_interval is None:
        # Streams between two on disk are computed again together, so memory must hold them.
        interval = max(1, min(interval, (on_device + on_host) // max(1, one)))
        while interval < count and disk_bytes(config, settings, interval, windows * length, tuned) > most:
            interval += 1
    disk = disk_bytes(config, settings, interval, windows * length, tuned)
    if resources.max_disk and disk > resources.max_disk:
        raise UserError(
            f"the pass needs {console.format_bytes(disk)} of disk, --max-disk allows "
            f"{console.format_bytes(resources.max_disk)}"
        )
    return Budget(batch, interval, on_device, on_host, parts, base + on_host, disk)
