"""What every command prints and writes: progress bars, tables, sizes for people, files that appear whole."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from uniql_jax.errors import UserError

T = TypeVar("T")


def format_bytes(count: float | int) -> str:
    """Bytes for people, decimal units: 84300000 -> '84.3 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def progress(iterable: Iterable[T], desc: str, total: int | None = None) -> Iterable[T]:
    """A progress bar on stderr: lively on a terminal, a line now and then in a log."""
    tty = sys.stderr.isatty()
    return tqdm(
        iterable, desc=desc, total=total, file=sys.stderr, mininterval=0.2 if tty else 10, dynamic_ncols=tty, leave=tty
    )


def table(rows: Iterable[Sequence[Any]], header: Sequence[str]) -> str:
    """Plain text columns: numbers to the right, words to the left, None as '-'; floats get four digits."""
    rows = [list(row) for row in rows]
    cells = [list(header)] + [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    words = [any(isinstance(row[i], str) and not row[i][:1].isdigit() for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if left else c.rjust(w) for c, w, left in zip(row, widths, words, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_whole(path: str | Path, data: str | bytes) -> None:
    """Write a temporary file in the same folder and rename it, so that a half-written one is never seen.

    Raises UserError when the disk says no.
    """
    path = Path(path).absolute()
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes private files; a result is an ordinary one
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
