"""One checkpoint at a prune rate that can change, and the batch that it runs; `session.Elastic` decides on the rate."""

from __future__ import annotations

import collections
import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.errors import UserError
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.plan import check_rate
from uniql_jax.runtime import resizing
from uniql_jax.runtime.batching import Batch, every_variant, variant_of
from uniql_jax.runtime.budget import Need, Needs
from uniql_jax.runtime.compiled import Shape
from uniql_jax.runtime.lanes import DEFAULT, Lanes
from uniql_jax.runtime.loading import default_dtype, load
from uniql_jax.runtime.programs import programs_of
from uniql_jax.runtime.prompts import check_prompt, token_array
from uniql_jax.runtime.requests import Request, Settings
from uniql_jax.runtime.sampling import check_cache_bits
from uniql_jax.runtime.steps import Variant

CONTEXT = 2048


class Engine:
    """Weights, caches and compiled steps of one checkpoint. All methods may be called from any thread.

    Attributes:
        checkpoint: what it runs.
        shape: rows of the batch, and tokens of each.
        model: the weights at the present rate; it changes in place.
    """

    model: CausalLM

    def __init__(
        self,
        folder: str | Path,
        context: int | None,
        batch: int,
        dtype: Any,
        cache: str,
        other_rates: int | None,
        cache_bits: int = 16,
        marks: bool = True,
    ):
        """Open a checkpoint, without reading its weights; `start` does."""
        self.checkpoint = open_checkpoint(folder)
        longest = self.checkpoint.config.max_position
        context = min(CONTEXT, longest) if context is None else context
        for name, value in (("context", context), ("batch", batch)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be an integer of at least 1, not {value!r}")
        if context > longest:
            raise UserError(f"a context of {context} tokens exceeds the model's {longest}")
        check_cache_bits(cache_bits)
        self.shape = Shape(batch, context, cache_bits, marks)
        self._folder, self._dtype = folder, default_dtype() if dtype is None else dtype
        self._cache_policy = resizing.check_policy(cache)
        self._turnstile = threading.RLock()
        self._lock, self._programs, self._batch = (
            threading.RLock(),
            programs_of(self.checkpoint.config),
            Batch(self.shape),
        )
        if other_rates is not None and (isinstance(other_rates, bool) or not 0 <= other_rates < 100):
            raise UserError(f"other_rates must be an integer from 0 to 99, not {other_rates!r}")
        self._needs = Needs(self.checkpoint, self.shape, self._dtype, self._programs, 1 + (other_rates or 0))
        self._lanes = Lanes(self._needs, DEFAULT if other_rates is None else other_rates)
        self._incoming: collections.deque[Request] = collections.deque()
        self._warm: list[float] = []
        self._target: float | None = None  # of a switch under way

    def start(self, rate: float) -> None:
        """Read the weights."""
        self.model = load(self._folder, rate, self._dtype)
        self._batch.use(self._needs.compiled(rate), self.model.params, None, rate)

    # ---------------------------------------------------------------------------------------------- the rate

    @property
    def rate(self) -> float:
        """The present prune rate; set it to change it, also while texts are being made."""
        return self.model.rate

    @rate.setter
    def rate(self, rate: float | int) -> None:
        self.set_rate(rate)

    @property
    def need(self) -> Need:
        """Bytes that the present rate needs."""
        return self._needs.at(self.rate)

    @property
    def highest_rate(self) -> float:
        """The highest prune rate that the checkpoint has; 0 for an unsorted one."""
        return self._needs.highest

    @property
    def warm_rates(self) -> list[float]:
        """Rates whose steps were compiled by `warm_up`, rising."""
        return list(self._warm)

    def bytes_at(self, rate: float) -> int:
        """Bytes of weights and cache at a rate, from shapes alone."""
        return self._needs.weights(rate) + self._needs.cache(rate)

    def set_rate(self, rate: float | int, cache: str | None = None, ahead: bool = True) -> None:
        """Go on at another prune rate.

        Args:
            rate: from 0 to 0.35. Higher than now: suffixes of weights and caches go, and their memory with them. Lower:
                the missing bytes are read from disk.
            cache: "read-again" or "extend", in place of the session's own choice.
            ahead: compile first what the texts at work will need, while other threads make them go on at the present
                rate; otherwise memory is free sooner, and texts wait.

        Raises:
            UserError: a rate that the checkpoint does not have, or files that cannot be read; the rate is as before.
        """
        target = check_rate(rate)
        self.checkpoint.keep(target)
        policy = self._cache_policy if cache is None else resizing.check_policy(cache)
        if ahead and target != self.rate:
            self._prepare(target, policy)
        with self._turnstile, self._lock:
            if target == self.rate and self._target is None:
                return
            before = self.rate
            self._batch.land()
            try:
                self._switch(target, policy)
            except Exception:
                self._switch(before, policy)  # what has grown is cut again, for which nothing is read
                raise

    def _prepare(self, target: float, policy: str) -> None:
        """Compile what the requests at work need at another rate; no lock is held."""
        working = [row.request for _, row in self._batch.active]
        for request in working:
            if request.rate == self.rate > target:  # it will go on in a lane
                self._prepare_lane(request, self.rate)
        requests = [request for request in working if request.rate in (None, target)]
        if not requests:
            return
        again = target < self.rate and policy == "read-again"
        lengths = {self.shape.padded(request.length) for request in requests} if again else ()
        self._needs.compiled(target).prepare_all([variant_of(requests)], lengths, reuse=False)

    def _switch(self, target: float, policy: str) -> None:
        """Bring every layer to the target's sizes, one after another; an interrupted switch is finished later."""
        wanted = self.checkpoint.keep(target)
        grows = any(
            keep[axis] > have[axis] for have, keep in zip(self.model.keep, wanted, strict=True) for axis in keep
        )
        self._target = target
        self._lanes.release()
        others = [request for request in self._batch.requests if request.rate not in (None, target)]
        self._incoming.extendleft(reversed(others))  # first: an interrupt may leave them twice, but not lose them
        self._batch.drop(others)
        cache = self._batch.give_cache()
        if grows and policy == "read-again":
            cache = None  # two need not fit
        states = None if cache is None else list(cache.layers)
        resizing.resize(self._programs, self.checkpoint, self.model, wanted, states, self._dtype)
        if cache is not None and states is not None:
            cache = cache.replace(layers=tuple(states))
        self.model.rate = target
        self._batch.use(self._needs.compiled(target), self.model.params, cache, target)
        self._lanes.take(self.model)
        self._target = None
        resizing.return_memory()

    def warm_up(self, rates: Sequence[float], lengths: Sequence[int] | None = None, sampling: bool = True) -> None:
        """Compile what these rates need, so that switching between them compiles nothing.

        Args:
            rates: prune rates; `fit` and `watch` choose among them from now on.
            lengths: of the prompts, and of texts when they are read again (default: every length to the context).
            sampling: whether temperatures above 0 and log-probabilities are wanted, too.
        """
        lengths = self.shape.lengths() if lengths is None else sorted({self.shape.padded(n) for n in lengths})
        variants = every_variant() if sampling else [Variant()]
        for rate in dict.fromkeys(check_rate(rate) for rate in rates):
            self._needs.compiled(rate).prepare_all(variants, lengths)
            self._warm = sorted({*self._warm, rate})
        if not resizing.on_host():
            for have, keep in itertools.permutations(self._warm, 2):
                resizing.prepare(self._programs, self._needs, have, keep)

    def seconds_per_token(self) -> float:
        """Seconds that a step over an empty batch takes, per token of a row."""
        with self._lock:
            return self._batch.seconds_per_token()

    # ---------------------------------------------------------------------------------------------- requests

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
            self._lanes.check(rate, self.rate)
        request = Request(ids.astype(np.int32), settings, self.step, rate)
        if rate is not None and rate != self.rate:
            self._prepare_lane(request, rate)
        self._incoming.append(request)  # no lock: a step may take as long as compiling does
        return request

    def _prepare_lane(self, request: Request, rate: float) -> None:
        """Compile what a request needs at a rate of its own; no lock is held, so that others go on."""
        compiled, variant = self._needs.compiled(rate), variant_of([request])
        compiled.prepare_all([variant], [self.shape.padded(request.length)], reuse=False)

    @property
    def _batches(self) -> list[Batch]:
        return [self._batch, *self._lanes.batches]

    def _route(self) -> None:
        """Hand new requests to the batch of their rate."""
        while self._incoming:
            request = self._incoming[0]
            if request.rate in (None, self.rate):
                self._batch.waiting.append(request)
            elif request.reason is None:
                self._lanes.add(request, request.rate, self.model)
            self._incoming.popleft()

    def step(self) -> bool:
        """Make the batch go on by a step; whether there is more to do."""
        with self._turnstile:  # whoever wants to change the rate gets the lock before the next step
            pass
        with self._lock:
            if self._target is not None:
                self._switch(self._target, self._cache_policy)
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

    def memory(self) -> dict[str, int]:
        """Bytes held now: weights and cache."""
        weights = sum(int(x.nbytes) for x in jax.tree.leaves(dict(self.model.params)))
        return {"weights": weights, "cache": self._batch.cache_bytes() + self._lanes.cache_bytes()}

    def load_now(self) -> dict[str, int]:
        """Rows at work, and requests that wait for one."""
        waiting = len(self._incoming) + sum(len(batch.waiting) for batch in self._batches)
        return {"active": sum(self.active_at().values()), "waiting": waiting}

    def active_at(self) -> dict[float, int]:
        """Rows at work at each prune rate that runs: the session's, and those that requests asked for."""
        found = collections.Counter({self.rate: 0})
        for batch in self._batches:
            found[batch.rate] += len(batch.active)
        return dict(found)

    def runs(self, rate: float) -> bool:
        """Whether a request may ask for a prune rate, as the session is now."""
        return self._lanes.available(rate, self.rate)
