"""Lanes: requests that run at a prune rate of their own, next to the session's.

A lane is a batch with rows and a cache of its own. Its weights are prefixes of those that the session holds, in the
same memory, so that a second rate costs a cache but no weights. Not thread-safe, like `batching.Batch`.
"""

from __future__ import annotations

from uniql_jax.errors import UserError
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.runtime.batching import Batch
from uniql_jax.runtime.budget import Needs
from uniql_jax.runtime.choice import Choice
from uniql_jax.runtime.prefixes import prefix_tree
from uniql_jax.runtime.requests import Request

DEFAULT = 2
"""Other rates at a time where no memory budget limits them."""


class RateUnavailable(UserError):
    """A prune rate that a request cannot have. `busy`: not now, since others take what it needs."""

    def __init__(self, message: str, busy: bool = False):
        super().__init__(message)
        self.busy = busy


class Lanes:
    """The lanes of a session, each open for as long as it has something to do."""

    def __init__(self, needs: Needs, most: int):
        """No lane is open. most: how many may be at a time."""
        self.most = most
        self._needs = needs
        self._open: dict[float, Batch] = {}

    @property
    def rates(self) -> list[float]:
        """Prune rates of the open lanes, rising."""
        return sorted(self._open)

    @property
    def batches(self) -> list[Batch]:
        """The open lanes."""
        return list(self._open.values())

    def available(self, rate: float, size: Choice) -> bool:
        """Whether a request at `rate` could run while the session is at a size, sooner or later."""
        return _holds(size, rate) and (rate == size.rate or self.most > 0)

    def check(self, rate: float, size: Choice) -> None:
        """Raises RateUnavailable where a request at `rate` cannot run while the session is at a size."""
        if not _holds(size, rate):
            raise RateUnavailable(_not_held(rate, size))
        present = size.rate
        if rate == present or rate in self._open:
            return
        if not self.most:
            raise RateUnavailable(
                f"this session runs one prune rate at a time, {present:g} now, within its memory budget; "
                "other_rates= makes room for more"
            )
        if len(self._open) >= self.most:
            taken = ", ".join(f"{other:g}" for other in self.rates)
            raise RateUnavailable(
                f"requests at other prune rates ({taken}) take the place of {rate:g}; ask for one of these or wait",
                busy=True,
            )

    def add(self, request: Request, rate: float, model: CausalLM, size: Choice) -> None:
        """Queue a request at its rate, in a lane that is opened where there is none; else end it with an error."""
        if not _holds(size, rate):
            request.finish("error", RateUnavailable(_not_held(rate, size)))
            return
        if rate not in self._open:
            batch = Batch(self._needs.shape)
            compiled = self._needs.compiled(rate)
            batch.use(compiled, prefix_tree(model.params, compiled.params), None, self._needs.size(rate))
            self._open[rate] = batch
        self._open[rate].waiting.append(request)

    def close_idle(self) -> None:
        """Close lanes that have nothing to do; their caches go."""
        self._open = {rate: batch for rate, batch in self._open.items() if batch.busy}

    def release(self) -> None:
        """Let go of all weights, so that a change of the session's returns memory; `take` must follow."""
        for batch in self._open.values():
            batch.land()
            batch.params = None

    def take(self, model: CausalLM, size: Choice) -> None:
        """Go on with a session's weights after a change; requests at rates that these do not hold end with an error."""
        for rate in self.rates:
            batch = self._open[rate]
            if not _holds(size, rate):
                batch.fail(RateUnavailable(_not_held(rate, size)))
                del self._open[rate]
            else:
                batch.params = prefix_tree(model.params, self._needs.compiled(rate).params)

    def cache_bytes(self) -> int:
        """Bytes of all their caches."""
        return sum(batch.cache_bytes() for batch in self.batches)


def _holds(size: Choice, rate: float) -> bool:
    """Whether weights of a size begin with those of a prune rate."""
    return size.setting is None and rate >= size.rate


def _not_held(rate: float, size: Choice) -> str:
    present = size.rate
    if size.setting is not None:
        return (
            f"prune rate {rate:g} needs all bits of its weights, and this session has given up some "
            f"({size}); ask for no rate, or set the session's rate to {rate:g}"
        )
    return (
        f"prune rate {rate:g} needs weights that a session at {present:g} does not hold; "
        f"ask for {present:g} or more, or set the session's rate to {rate:g}"
    )
