"""One JSON line a layer and stage, through Python's logging: what it took and what came of it."""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from uniql_jax.errors import UserError

LOGGER = logging.getLogger("uniql_jax.compress")


class Clock:
    """Seconds from one line to the next."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def line(self, stage: str, layer: int, **values: Any) -> None:
        """Log a finished layer: seconds since the last line, peaks of memory so far (bytes), and the values given."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if not LOGGER.isEnabledFor(logging.INFO):
            return
        unit = 1 if sys.platform == "darwin" else 1024
        peaks = {"host_peak": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
        if stats := jax.local_devices()[0].memory_stats():
            peaks["device_peak"] = stats["peak_bytes_in_use"]
        LOGGER.info(json.dumps({"stage": stage, "layer": layer, "seconds": round(seconds, 3), **peaks, **values}))


@contextlib.contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Append the lines of the block to a file; UserError when it cannot be written."""
    try:
        handler = logging.FileHandler(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    handler.setFormatter(logging.Formatter("%(message)s"))
    level, propagate = LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagate
        handler.close()
