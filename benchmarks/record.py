"""What every recorded result says about where it came from."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Any

import jax


def environment() -> dict[str, Any]:
    """Device, versions, command and date."""
    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy", "flax", "transformers")}
    return {
        "device": device.device_kind if device.platform != "cpu" else f"CPU ({platform.machine()})",
        "python": platform.python_version(),
        "versions": versions,
        # Where files lay on the machine that measured is nobody's business: their names are enough.
        "command": " ".join(["python", *map(_without_folders, sys.argv)]),
        "date": datetime.date.today().isoformat(),
    }


def _without_folders(word: str) -> str:
    """An argument, FILE or NAME=FILE, with the file's name alone; what is no path (`v/o joint`) stays."""
    name, equals, value = word.rpartition("=")
    path = Path(value)
    return f"{name}{equals}{path.name}" if path.is_absolute() or path.exists() else word
