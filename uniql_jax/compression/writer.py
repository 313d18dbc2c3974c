"""Writes files behind the work's back, in the order in which they were handed over."""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Callable
from types import TracebackType
from typing import Any

Future = concurrent.futures.Future[Any]


class Writer:
    """One thread that writes while the next layer is computed.

    What waits is bounded, so a slow disk slows the run down and does not fill the memory. An error of a write is raised
    by the next call. Leaving the context after an error drops what has not begun.
    """

    def __init__(self, ahead: int = 4):
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._waiting: collections.deque[Future] = collections.deque()
        self._ahead = ahead

    def submit(self, write: Callable[..., object], *args: Any) -> Future:
        """Write later; waits until no more than `ahead` writes are before it."""
        while len(self._waiting) > self._ahead or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(write, *args))
        return self._waiting[-1]

    def flush(self) -> None:
        """Wait until everything is written."""
        while self._waiting:
            self._waiting.popleft().result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.flush()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
