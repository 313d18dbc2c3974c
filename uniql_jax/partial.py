"""Files of which only some bytes are here: full length on disk, and next to them which ranges have been written.

What a checkpoint needs at a prune rate is a set of ranges of its files, and a lower rate later needs some more.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from pathlib import Path

LOG = ".ranges"
"""Ending of the log: one line `start end` for each range that has been written."""

Range = tuple[int, int]


def merged(ranges: Iterable[Range]) -> list[Range]:
    """Ranges in order, those that touch joined."""
    out: list[Range] = []
    for start, end in sorted(ranges):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(end, out[-1][1])
        elif end > start:
            out.append((start, end))
    return out


def without(ranges: Iterable[Range], taken: Iterable[Range]) -> list[Range]:
    """What of some ranges lies in none of others."""
    out, taken = [], merged(taken)
    for start, end in merged(ranges):
        for low, high in taken:
            if high <= start or low >= end:
                continue
            if low > start:
                out.append((start, low))
            start = max(start, high)
        if start < end:
            out.append((start, end))
    return out


def joined(ranges: Iterable[Range], waste: float = 0.02, gap: int = 1 << 20) -> list[Range]:
    """Ranges with the smallest gaps between them filled, as long as that adds no more than a part of their bytes.

    Args:
        ranges: any.
        waste: largest part of the bytes that gaps may add.
        gap: widest gap to fill.
    """
    found = merged(ranges)
    left = int(waste * sum(end - start for start, end in found))
    gaps = sorted((after[0] - before[1], before[1], after[0]) for before, after in itertools.pairwise(found))
    for size, start, end in gaps:
        if size > min(gap, left):
            break
        left -= size
        found.append((start, end))
    return merged(found)


class PartialFile:
    """A file of known length whose ranges arrive one by one, over processes as well.

    Args:
        path: of the file; its log lies next to it.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.log = self.path.with_name(self.path.name + LOG)
        self._read: tuple[int, list[Range]] = -1, []

    @property
    def exists(self) -> bool:
        """Whether the file is one that may have gaps."""
        return self.log.is_file()

    @property
    def have(self) -> list[Range]:
        """What has been written."""
        if not self.exists:
            return []
        length = self.log.stat().st_size
        if self._read[0] == length:
            return self._read[1]
        found = []
        for line in self.log.read_text(encoding="ascii", errors="replace").splitlines():
            parts = line.split()
            # the last line of a process that was killed may lack its end
            if len(parts) == 3 and parts[2] == "ok" and parts[0].isdigit() and parts[1].isdigit():
                found.append((int(parts[0]), int(parts[1])))
        self._read = length, merged(found)
        return self._read[1]

    def create(self, size: int) -> None:
        """Give the file its length; what it may have held is forgotten unless its length is that."""
        if self.exists and self.path.is_file() and self.path.stat().st_size == size:
            return
        self.log.unlink(missing_ok=True)
        with open(self.path, "wb") as file:
            file.truncate(size)
        self.log.touch()

    def missing(self, ranges: Iterable[Range]) -> list[Range]:
        """What of some ranges is not here yet."""
        return without(ranges, self.have)

    def write(self, start: int, data: bytes) -> None:
        """Put bytes into their place; they count once `keep` has noted them."""
        with open(self.path, "r+b") as file:
            file.seek(start)
            file.write(data)

    def keep(self, start: int, end: int) -> None:
        """Note a range that has been written."""
        if end > start:
            with open(self.log, "ab") as file:
                file.write(f"\n{start} {end} ok".encode())  # on a line of its own, whatever a kill left of the last
