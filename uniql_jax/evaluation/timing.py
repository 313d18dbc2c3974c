"""Measuring on the device: seconds of a call, what a program takes, the memory's speed, and where it was measured.

A clock stops only once the device is done.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from uniql_jax.pallas_kernels.dequant_matmul import default_implementation

COPY_BYTES = {"cpu": 2**28, "gpu": 2**31}
"""Bytes of the array that the memory's speed is measured on: far beyond any device's caches."""
COPIES = 8
VARIABLES = ("UNIQL_KERNELS", "JAX_PLATFORMS", "XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "JAX_ENABLE_X64")
"""Environment variables that change what is measured."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median, least and most of repeated measurements, in seconds unless it says otherwise."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        """Sum up measurements."""
        return cls(statistics.median(samples), min(samples), max(samples), len(samples))

    def scaled(self, factor: float) -> Timing:
        """The same in another unit, or per step."""
        return Timing(self.median * factor, self.low * factor, self.high * factor, self.repeats)


def measure(run: Callable[..., Any], repeats: int, prepare: Callable[[], tuple] = tuple) -> Timing:
    """Seconds that run(*prepare()) takes until its result is on the device, `prepare` not counted."""
    samples = []
    for turn in range(repeats + 1):
        arguments = jax.block_until_ready(prepare())
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        if turn:  # the first warms up
            samples.append(time.perf_counter() - start)
    return Timing.of(samples)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step: what it took to trace and compile (seconds), and the memory it needs (bytes; None: unknown).

    memory_bytes counts weights, cache, results and scratch, each once.
    """

    run: Callable[..., Any]
    compile_seconds: float
    memory_bytes: int | None


def compile_program(function: Any, *arguments: Any, **static: Any) -> Program:
    """Compile a jitted function for these arguments (arrays or their shapes) and static ones by name."""
    start = time.perf_counter()
    compiled = function.lower(*arguments, **static).compile()
    seconds = time.perf_counter() - start
    sizes = compiled.memory_analysis()
    held = None
    if sizes is not None:
        held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
        held = int(held - sizes.alias_size_in_bytes)
    return Program(compiled, seconds, held)


def device_bytes(tree: Any) -> int:
    """Bytes of all arrays in a tree."""
    return sum(int(leaf.nbytes) for leaf in jax.tree.leaves(tree))


def copy_bandwidth(repeats: int = 5) -> Timing:
    """Bytes a second, read and written, of an array that is passed through the device's memory."""
    size = COPY_BYTES.get(jax.default_backend(), 2**28)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def run(x: Array) -> Array:
        for _ in range(COPIES):
            x = add(x)
        return x

    timing = measure(run, repeats, lambda: (jnp.zeros(size // 4, jnp.int32),))
    moved = 2 * size * COPIES
    return Timing(moved / timing.median, moved / timing.high, moved / timing.low, timing.repeats)


def peak_bytes() -> int | None:
    """Most bytes the device has held at a time since the process began, or None where it does not count them."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def memory_limit() -> int | None:
    """Bytes that the device can hold: what JAX may take of a GPU, the machine's memory for a CPU; None: unknown."""
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None and device.platform == "cpu" and hasattr(os, "sysconf"):
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(limit) if limit and limit > 0 else None


def device_name(count: int = 1) -> str:
    """The device that computes, in words, or so many of them."""
    device = jax.devices()[0]
    name = f"CPU ({platform.machine()}, {os.cpu_count()} cores)" if device.platform == "cpu" else device.device_kind
    return name if count == 1 else f"{count} x {name}"


def environment(command: Sequence[str] | None = None) -> dict[str, Any]:
    """Where a measurement came from: device, versions, the environment variables that matter, command (None: the script
    that runs) and date.

    Of files only names are kept: where they lay is nobody's business.
    """

    def short(word: str) -> str:
        name, equals, value = word.rpartition("=")
        path = Path(value)
        return f"{name}{equals}{path.name}" if path.is_absolute() or path.exists() else word

    found = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    return {
        "device": device_name(),
        "driver": jax.devices()[0].client.platform_version.splitlines()[-1],
        "python": platform.python_version(),
        "versions": {
            name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy", "flax", "transformers")
        },
        "variables": {name: " ".join(map(short, value.split())) for name, value in found.items()},
        "kernels": default_implementation(),
        "command": " ".join(map(short, ["python", *sys.argv] if command is None else command)),
        "date": datetime.date.today().isoformat(),
    }
