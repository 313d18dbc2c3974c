"""The thread that makes the batch go on, and how the event loop hears of new tokens."""

from __future__ import annotations

import asyncio
import collections
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

from uniql_jax.runtime.requests import Emitted, Request, Settings
from uniql_jax.runtime.session import Elastic

WINDOW = 10.0
"""Seconds over which tokens/s are counted."""
log = logging.getLogger(__name__)


class Worker:
    """Runs a session in a thread of its own for as long as there is anything to do."""

    def __init__(self, session: Elastic):
        self.session = session
        self.tokens = 0
        self._marks: collections.deque[tuple[float, int]] = collections.deque()
        self._wake, self._stop = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="uniql-worker", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the step under way."""
        self._stop = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while not self._stop:
            self._wake.clear()
            try:
                more = self.session.step()
            except Exception:  # its requests have heard of it; the next ones start anew
                log.exception("a step failed")
                more = False
            if not more and not self._stop:
                self._wake.wait()

    def submit(self, prompt: Sequence[int], settings: Settings, rate: float | None) -> Request:
        """Queue a request. Raises UserError for one that cannot be served."""
        request = self.session.submit(prompt, settings, rate)
        self._wake.set()
        return request

    def count(self, new: int) -> None:
        """Tokens that were handed out."""
        self.tokens += new
        now = time.monotonic()
        self._marks.append((now, new))
        while self._marks and self._marks[0][0] < now - WINDOW:
            self._marks.popleft()

    def tokens_per_second(self) -> float:
        """Tokens handed out in the last seconds, per second."""
        now = time.monotonic()
        recent = [(when, new) for when, new in list(self._marks) if when >= now - WINDOW]
        return sum(new for _, new in recent) / max(now - recent[0][0], 1.0) if recent else 0.0


async def listen(
    request: Request, count: Callable[[list[Emitted]], None] = lambda new: None
) -> AsyncIterator[list[Emitted]]:
    """New tokens of a request as they come, some at a time; its error, if it has one. Leaving early cancels it."""
    loop, news, given = asyncio.get_running_loop(), asyncio.Event(), 0

    def tell() -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(news.set)

    request.listen(tell)
    try:
        while True:
            await news.wait()
            news.clear()
            ended = request.reason is not None  # read first: what came before the end is still handed out
            new = request.take(given)
            given += len(new)
            if new:
                count(new)
                yield new
            if ended and not request.take(given):
                break
            if ended:
                news.set()
    finally:
        request.cancel()
    if request.error is not None:
        raise request.error
