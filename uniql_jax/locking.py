"""An advisory lock on a work folder, so that two processes never resume the same run at the same time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from uniql_jax.errors import UserError

LOCK = ".lock"
OWNER = ".lock.pid"


@contextlib.contextmanager
def hold_lock(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock of a work folder, which is made if it is missing, while the block runs.

    The operating system frees the lock when the process ends, however it ends. A folder that holds nothing else
    afterwards is removed.

    Args:
        folder: the work folder of a run.

    Raises:
        UserError: another process, or another thread of this one, holds the lock, or the folder cannot be written.
    """
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place / LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another process ({_owner(place)}) is working on {place}; wait until it has ended, or end it"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise UserError(f"cannot lock {place}: {getattr(error, 'strerror', None) or error}") from None
    try:
        with contextlib.suppress(OSError):  # on a full disk the lock still holds; only the message lacks a number
            (place / OWNER).write_text(str(os.getpid()))
        yield
    finally:
        _tidy(place)
        lock.release()


def _tidy(folder: Path) -> None:
    """Remove a work folder that nothing but the lock was put into."""
    with contextlib.suppress(OSError):
        if {path.name for path in folder.iterdir()} <= {LOCK, OWNER}:
            for name in (OWNER, LOCK):
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()


def _owner(folder: Path) -> str:
    try:
        return f"pid {int((folder / OWNER).read_text())}"
    except (OSError, ValueError):
        return "pid unknown"
