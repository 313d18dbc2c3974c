"""One checkpoint at a size that can change, with the batches that run it; `engine.Engine` serves requests with it."""

from __future__ import annotations

import collections
import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.errors import UserError
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.plan import check_rate
from uniql_jax.runtime import resizing
from uniql_jax.runtime.batching import Batch
from uniql_jax.runtime.budget import Need, Needs
from uniql_jax.runtime.choice import Choice
from uniql_jax.runtime.compiled import Shape
from uniql_jax.runtime.flights import every_variant, variant_of
from uniql_jax.runtime.lanes import DEFAULT, Lanes
from uniql_jax.runtime.loading import default_dtype, load_size
from uniql_jax.runtime.programs import programs_of
from uniql_jax.runtime.requests import Request
from uniql_jax.runtime.sampling import check_cache_bits
from uniql_jax.runtime.steps import Variant

CONTEXT = 2048


class Switching:
    """Weights, caches and compiled steps of one checkpoint. All methods may be called from any thread.

    Attributes:
        checkpoint: what it runs.
        shape: rows of the batch, tokens of each, and bits of their caches.
        model: the weights at the present size; it changes in place.
        why: one line that says which size was chosen, and why.
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
        self.shape = Shape(batch, context, cache_bits, bool(marks))
        self._dtype = default_dtype() if dtype is None else dtype
        self._cache_policy = resizing.check_policy(cache)
        self._turnstile = threading.RLock()
        self._lock, self._programs = threading.RLock(), programs_of(self.checkpoint.config)
        self._batch = Batch(self.shape)
        counts = isinstance(other_rates, int) and not isinstance(other_rates, bool) and 0 <= other_rates < 100
        if other_rates is not None and not counts:
            raise UserError(f"other_rates must be an integer from 0 to 99, not {other_rates!r}")
        self._needs = Needs(self.checkpoint, self.shape, self._dtype, self._programs, 1 + (other_rates or 0))
        self._lanes = Lanes(self._needs, DEFAULT if other_rates is None else other_rates)
        self._incoming: collections.deque[Request] = collections.deque()
        self._warm: list[float] = []
        self._target: tuple[Choice, str] | None = None  # of a change under way, and its `why`
        self.size, self.why = self._needs.size(0.0), ""

    def start(self, size: Choice) -> None:
        """Read the weights."""
        self.model, self.size = load_size(self.checkpoint, size, self._dtype), size
        self._batch.use(self._needs.compiled(size), self.model.params, None, size)

    # ---------------------------------------------------------------------------------------------- what it is like

    @property
    def rate(self) -> float:
        """The present prune rate; set it to change it, also while texts are being made.

        At a setting of the joint plan of nested bits: the fraction of the prunable parameters that it leaves out.
        """
        return self.size.shown_rate

    @rate.setter
    def rate(self, rate: float | int) -> None:
        self.set_rate(rate)

    @property
    def need(self) -> Need:
        """Bytes that the present size needs."""
        return self._needs.at(self.size)

    @property
    def highest_rate(self) -> float:
        """The highest prune rate that the checkpoint has; 0 for an unsorted one."""
        return self._needs.highest

    @property
    def warm_rates(self) -> list[float]:
        """Rates whose steps were compiled by `warm_up`, rising."""
        return list(self._warm)

    @property
    def sizes(self) -> Sequence[Choice]:
        """All sizes that a budget chooses from, the largest first."""
        return self._needs.sizes

    def bytes_at(self, size: Choice | float) -> int:
        """Bytes of weights and cache at a size, or at a prune rate, from shapes alone."""
        return self._needs.weights(size) + self._needs.cache(size)

    # ---------------------------------------------------------------------------------------------- changes

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
        size = self._needs.size(check_rate(rate))
        self.set_size(size, cache, ahead, f"{size}: as asked for")

    def set_size(self, size: Choice, cache: str | None = None, ahead: bool = True, why: str = "") -> None:
        """Go on at another size of the checkpoint, such as `sizes` has; see `set_rate`."""
        policy = self._cache_policy if cache is None else resizing.check_policy(cache)
        if size.setting is not None and self.checkpoint.joint_plan is None:
            raise UserError(f"{self.checkpoint.folder} has no nested bits (compress --nested-bits), but prune rates")
        if ahead and size != self.size:
            self._prepare(size, policy)
        with self._turnstile, self._lock:
            if size == self.size and self._target is None:
                self.why = why or self.why
                return
            before = self.size, self.why
            self._batch.land()
            try:
                self._switch(size, why or f"{size}: as asked for", policy)
            except Exception:
                self._switch(*before, policy)  # what has grown is cut again
                raise

    def _grows(self, size: Choice) -> bool:
        """Whether a size has entries or bits that the present one lacks."""
        have, want = (
            [one for layer in some.kept(self.checkpoint) for one in layer.values()]
            + [some.kept_top(self.checkpoint, name) for name in ("embed", "head")]
            for some in (self.size, size)
        )
        return any(new.entries > old.entries or new.full > old.full for old, new in zip(have, want, strict=True))

    def _prepare(self, size: Choice, policy: str) -> None:
        """Compile what the requests at work need at another size; no lock is held."""
        working = [row.request for _, row in self._batch.active]
        if size.setting is None:
            for request in working:
                if request.rate == self.rate > size.rate:  # it will go on in a lane
                    self._prepare_lane(request, self.rate)
        requests = [request for request in working if request.rate is None or request.rate == _pinned(size)]
        if not requests:
            return
        again = policy == "read-again" and self._grows(size)
        lengths = {self.shape.padded(request.length) for request in requests} if again else ()
        self._needs.compiled(size).prepare_all([variant_of(requests)], lengths, reuse=False)

    def _prepare_lane(self, request: Request, rate: float) -> None:
        """Compile what a request needs at a rate of its own; no lock is held, so that others go on."""
        compiled, variant = self._needs.compiled(rate), variant_of([request])
        compiled.prepare_all([variant], [self.shape.padded(request.length)], reuse=False)

    def _switch(self, size: Choice, why: str, policy: str) -> None:
        """Bring every layer to a size, one after another; an interrupted switch is finished later."""
        grows = self._target is not None or self._grows(size)
        self._target = size, why
        self._lanes.release()
        others = [request for request in self._batch.requests if request.rate not in (None, _pinned(size))]
        self._incoming.extendleft(reversed(others))  # first: an interrupt may leave them twice, but not lose them
        self._batch.drop(others)
        cache = self._batch.give_cache()
        if grows and policy == "read-again":
            cache = None  # two need not fit
        states = None if cache is None else list(cache.layers)
        resizing.resize(self._programs, self.checkpoint, self.model, size, states, self._dtype)
        if cache is not None and states is not None:
            cache = cache.replace(layers=tuple(states))
        self.model.rate, self.model.plan = size.rate, None if size.setting is not None else self.checkpoint.plan
        self.size, self.why = size, why
        self._batch.use(self._needs.compiled(size), self.model.params, cache, size)
        self._lanes.take(self.model, size)
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

    def memory(self) -> dict[str, int]:
        """Bytes held now: weights and cache."""
        weights = sum(int(x.nbytes) for x in jax.tree.leaves(dict(self.model.params)))
        return {"weights": weights, "cache": self._batch.cache_bytes() + self._lanes.cache_bytes()}


def _pinned(size: Choice) -> float | None:
    """The rate that requests may have asked for and run at in a session's own batch."""
    return size.rate if size.setting is None else None
