"""Requests of one checkpoint whose size can change: they join the batch of their rate, and every step serves all."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Int

from uniql_jax.errors import UserError
from uniql_jax.plan import check_rate
from uniql_jax.runtime.batching import Batch
from uniql_jax.runtime.prompts import check_prompt, token_array
from uniql_jax.runtime.requests import Request, Settings
from uniql_jax.runtime.switching import Switching


class Engine(Switching):
    """A running checkpoint. All methods may be called from any thread; `session.Elastic` decides on its size."""

    def submit(
        self,
        prompt: Sequence[int] | Int[np.ndarray, " t"] | Int[Array, " t"],
        settings: Settings,
        rate: float | int | None = None,
    ) -> Request:
        """Queue a prompt.

        Args:
            prompt: token ids.
            settings: how to draw, and when to end.
            rate: the prune rate of this request, whatever others run at; it must be the session's or above, since
                weights are shared. None: the session's, also as that changes.

        Returns:
            The request; iterate over it for its tokens. It ends with an error once the session goes beyond its rate.

        Raises:
            UserError: a prompt or settings that cannot be used. `lanes.RateUnavailable`, which is one, for a rate that
                this session does not hold, or for one too many at a time.
        """
        ids = token_array(prompt)
        settings.check(self.checkpoint.config.vocab_size)
        check_prompt(self.checkpoint.config, ids[None], np.ones((1, ids.size), np.int32), settings.max_new_tokens)
        if ids.size + settings.max_new_tokens > self.shape.context:
            raise UserError(
                f"{ids.size} prompt tokens and {settings.max_new_tokens} new ones exceed the session's context of "
                f"{self.shape.context}"
            )
        if rate is not None:
            rate = check_rate(rate)
            self.checkpoint.keep(rate)
            self._lanes.check(rate, self.size)
        request = Request(ids.astype(np.int32), settings, self.step, rate)
        if rate is not None and rate != self.size.rate:
            self._prepare_lane(request, rate)
        self._incoming.append(request)  # no lock: a step may take as long as compiling does
        return request

    @property
    def _batches(self) -> list[Batch]:
        return [self._batch, *self._lanes.batches]

    def _route(self) -> None:
        """Hand new requests to the batch of their rate."""
        while self._incoming:
            request = self._incoming[0]
            if request.rate is None or (self.size.setting is None and request.rate == self.size.rate):
                self._batch.waiting.append(request)
            elif request.reason is None:
                self._lanes.add(request, request.rate, self.model, self.size)
            self._incoming.popleft()

    def step(self) -> bool:
        """Make the batch go on by a step; whether there is more to do."""
        with self._turnstile:  # whoever wants to change the rate gets the lock before the next step
            pass
        with self._lock:
            if self._target is not None:
                self._switch(*self._target, self._cache_policy)
            self._route()
            failed = None
            for batch in self._batches:
                try:
                    batch.step()
                except Exception as error:  # not an interrupt, after which requests go on
                    batch.fail(error)
                    failed = failed if isinstance(error, UserError) else error
            self._lanes.close_idle()
            if failed is not None:
                raise failed
            return bool(self._incoming or self._batch.busy or self._lanes.batches)

    def load_now(self) -> dict[str, int]:
        """Rows at work, and requests that wait for one."""
        waiting = len(self._incoming) + sum(len(batch.waiting) for batch in self._batches)
        return {"active": sum(self.active_at().values()), "waiting": waiting}

    def active_at(self) -> dict[float, int]:
        """Rows at work at each prune rate that runs: the session's, and those that requests asked for."""
        found = collections.Counter({self.rate: 0})
        for batch in self._batches:
            found[batch.size.shown_rate] += len(batch.active)
        return dict(found)

    def rates_at_work(self) -> set[float]:
        """Prune rates that run: the session's, where it is at one, and those that requests asked for."""
        return {batch.size.rate for batch in self._batches if batch.size.setting is None}

    def runs(self, rate: float) -> bool:
        """Whether a request may ask for a prune rate, as the session is now."""
        return self._lanes.available(rate, self.size)
