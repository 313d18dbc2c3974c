"""What every recorded result says about where it came from."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
import sys
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
        "command": " ".join(["python", *(re.sub(r"[^=\s]*/(?=[^/])", "", word) for word in sys.argv)]),
        "date": datetime.date.today().isoformat(),
    }
