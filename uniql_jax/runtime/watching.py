"""A watcher that follows free memory and changes a session's prune rate, with hysteresis."""

from __future__ import annotations

import logging
import math
import numbers
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from uniql_jax.console import format_bytes
from uniql_jax.errors import UserError
from uniql_jax.plan import check_rate
from uniql_jax.runtime.budget import free_memory, memory_capacity, parse_budget
from uniql_jax.runtime.choice import Choice, rate_size

if TYPE_CHECKING:
    from uniql_jax.runtime.session import Elastic

RATES = (0.0, 0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35)
SETTINGS = 16
"""Settings of a joint plan to choose among, in addition to the largest."""
log = logging.getLogger(__name__)


class Watcher:
    """Keeps a reserve of memory free by pruning, and prunes less again once there has been room for a while.

    It shrinks at once, to the smallest rate that leaves the reserve, and grows only after `patience` looks in a row
    that found room for the larger model, the reserve and `margin` of it more: what it takes itself never makes it
    shrink again.
    """

    def __init__(
        self,
        session: Elastic,
        interval: float | int = 5.0,
        *,
        reserve: int | float | str = "10%",
        margin: float | int = 0.5,
        patience: int = 3,
        rates: Sequence[float] | None = None,
        probe: Callable[[], int] | None = None,
        changed: Callable[[float], object] = lambda rate: None,
    ):
        """Set up; `start` begins.

        Args:
            session: whose rate to change.
            interval: seconds between two looks.
            reserve: memory to keep free: bytes, a size, or a share of the device's memory.
            margin: share of the reserve that must be free on top of it before the model grows.
            patience: looks in a row that must find room before it grows.
            rates: to choose from (default: those warmed up, else 0, 0.05, ... 0.35, or with nested bits settings of the
                joint plan).
            probe: returns the free bytes (default: of the device, or of the host where a CPU computes).
            changed: hears the new rate after each change.

        Raises:
            UserError: settings that cannot be used.
        """
        given = isinstance(interval, numbers.Real) and isinstance(margin, numbers.Real)
        if not (given and 0 < interval < math.inf and 0 <= margin < math.inf and patience >= 1):
            raise UserError("a watcher needs an interval above 0, a margin of at least 0 and a patience of at least 1")
        self.session, self.interval, self.margin, self.patience = session, interval, margin, patience
        self.reserve = parse_budget(reserve, memory_capacity)
        rates = None if rates is None else [session._needs.size(check_rate(rate)).rate for rate in rates]
        self._rates, self._probe, self._changed = rates, probe or free_memory, changed
        self._calm = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> Watcher:
        """Begin to look, in a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="uniql-watcher", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """End it; returns once it no longer changes anything."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.stop()

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            try:
                self.look()
            except Exception:
                log.exception("the watcher could not change the prune rate")

    def look(self) -> float:
        """Look once, and change the rate if it should; returns the rate."""
        session, free = self.session, int(self._probe())
        sizes, now = self._choices(), session.bytes_at(session.size)
        if free < self.reserve:
            self._calm = 0
            budget = now - (self.reserve - free)
            smaller = [size for size in sizes if session.bytes_at(size) < now]
            wanted = next((s for s in smaller if session.bytes_at(s) <= budget), smaller[-1] if smaller else None)
            if wanted is None:
                log.warning("%s are free of a reserve of %s, and the model is at its smallest", *self._sizes(free))
                return session.rate
            return self._change(wanted, free)
        budget = now + free - int(self.reserve * (1 + self.margin))
        larger = [size for size in sizes if now < session.bytes_at(size) <= budget]
        self._calm = self._calm + 1 if larger else 0
        if self._calm < self.patience:
            return session.rate
        self._calm = 0
        return self._change(larger[0], free)

    def _choices(self) -> list[Choice]:
        """Sizes to choose from, the largest first."""
        session = self.session
        rates = self._rates or session.warm_rates
        if not rates and session.checkpoint.joint_plan is not None:
            last = len(session.sizes) - 1
            return [session.sizes[round(i * last / SETTINGS)] for i in range(SETTINGS + 1)]
        rates = sorted(rates or [rate for rate in RATES if rate <= session.highest_rate])
        return [rate_size(session.checkpoint, rate) for rate in rates]

    def _sizes(self, free: int) -> tuple[str, str]:
        return format_bytes(free), format_bytes(self.reserve)

    def _change(self, size: Choice, free: int) -> float:
        session, (is_free, reserve) = self.session, self._sizes(free)
        log.info("%s -> %s: %s are free of a reserve of %s", session.size, size, is_free, reserve)
        grows = session.bytes_at(size) > session.bytes_at(session.size)
        why = f"{size}: as {is_free} were free of a reserve of {reserve}"
        session.set_size(size, ahead=grows, why=why)  # what shrinks must not wait for a compiler
        self._changed(session.rate)
        return session.rate
