"""A program on several virtual CPU devices, in a process of its own: their number is fixed when JAX starts."""

from __future__ import annotations

import os
import subprocess
import sys


def run(program: str, count: int, *arguments: str) -> str:
    """What a program prints on `count` devices, where warnings are errors."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    # Many devices on few cores wait for each other longer than XLA finds right.
    flags += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
