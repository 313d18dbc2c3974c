"""A work folder belongs to one process at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from uniql_jax.errors import UserError

LOCK = ".lock"


@contextlib.contextmanager
def hold_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a work folder that exists; the operating system releases it when the process ends, however.

    Raises:
        UserError: when another process holds it.
    """
    from filelock import FileLock, Timeout

    owner = folder / f"{LOCK}-owner"
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        try:
            who = f"process {owner.read_text().strip()}"
        except OSError:
            who = "another process"
        raise UserError(f"{who} is working on {folder}; wait for it, or name another output") from None
    try:
        owner.write_text(f"{os.getpid()}\n")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()
