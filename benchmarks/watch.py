"""What a run takes while it lasts: how busy the GPUs are, by the driver's own count, and how large a folder becomes."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from pathlib import Path

QUERY = ("nvidia-smi", "--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=200")
"""The driver says in what part of its last sampling period (at most a second) any kernel ran."""


class Watch(contextlib.AbstractContextManager["Watch"]):
    """Samples while the `with` block lasts; without a GPU only the folder is watched.

    Attributes:
        busy: (seconds since the start, card, percent of the time that a kernel ran), several times a second.
        largest: bytes of the folder's files at their most, looked at every half second.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.largest = folder, 0
        self.busy: list[tuple[float, int, float]] = []
        self.start, self.done = time.perf_counter(), threading.Event()
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Watch:
        with contextlib.suppress(FileNotFoundError):
            self.process = subprocess.Popen(QUERY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.threads = [threading.Thread(target=target, daemon=True) for target in (self._cards, self._sizes)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
        for thread in self.threads:
            thread.join()

    def busy_between(self, begin: float, end: float) -> list[float]:
        """Mean percentage of each card between two times, in seconds since the start."""
        cards: dict[int, list[float]] = {}
        for moment, card, percent in self.busy:
            if begin <= moment <= end:
                cards.setdefault(card, []).append(percent)
        return [round(sum(found) / len(found), 1) for _, found in sorted(cards.items())]

    def _cards(self) -> None:
        if self.process is None or self.process.stdout is None:
            return
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):  # a card that does not count its time
                card, percent = line.split(",")
                self.busy.append((time.perf_counter() - self.start, int(card), float(percent)))

    def _sizes(self) -> None:
        while not self.done.wait(0.5):
            size = 0
            for path in self.folder.rglob("*"):
                with contextlib.suppress(FileNotFoundError):  # renamed or removed while we look
                    size += path.stat().st_size
            self.largest = max(self.largest, size)
