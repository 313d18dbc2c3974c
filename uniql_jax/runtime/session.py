"""`Elastic`: one checkpoint, a budget, and a prune rate that changes while texts are being made."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Int

from uniql_jax.console import format_bytes
from uniql_jax.errors import UserError
from uniql_jax.plan import check_rate
from uniql_jax.runtime.budget import Need, parse_budget
from uniql_jax.runtime.choice import Choice, Sizes
from uniql_jax.runtime.engine import Engine
from uniql_jax.runtime.prompts import read_prompt, stop_ids
from uniql_jax.runtime.requests import Settings
from uniql_jax.runtime.text import decode_stream, folder_tokenizer
from uniql_jax.runtime.watching import Watcher


class Elastic(Engine):
    """An elastic checkpoint that runs at a prune rate of its own choice, and changes it while it runs.

    Requests share a batch of `batch` rows; any number may wait. A higher rate cuts suffixes off weights and caches in
    place, and texts go on without being read again. A lower one reads the missing bytes from disk; what caches then
    lack is made by reading the texts again, exactly (`cache="read-again"`), or left out for the tokens so far
    (`cache="extend"`: nothing waits, old tokens are seen as the higher rate made them).

    All methods may be called from any thread. Whoever waits for tokens makes the batch go on; an interrupt (Ctrl-C)
    loses nothing but what was in the making, which the next step makes again.

    With a budget, a checkpoint of nested bits runs at a setting of its joint plan of bits and units instead of a rate,
    and `fit` goes to another one in the same way.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        memory_budget: int | float | str | None = None,
        latency_budget: float | int | None = None,
        rate: float | int | None = None,
        context: int | None = None,
        batch: int = 1,
        dtype: Any = None,
        cache: str = "read-again",
        other_rates: int | None = None,
        cache_bits: int = 16,
        marks: bool = True,
        say: Callable[[str], object] = lambda line: None,
    ):
        """Choose a rate, say why, and load.

        Args:
            folder: elastic checkpoint, as `compress` writes it.
            memory_budget: bytes, a size ("3GiB"), or a share of the device's memory ("80%") that weights, cache and
                work space of compiled steps must fit; the smallest rate that does is taken. None: no limit.
            latency_budget: seconds that a token may take, with all rows at work; the smallest rate that is measured to
                keep it is taken. None: no limit.
            rate: the prune rate, in place of budgets.
            context: tokens of each row, prompt and answer together (default: 2,048, or what the model takes).
            batch: rows, that is texts at a time.
            dtype: of activations and dense weights (default: bfloat16 on GPUs, float32 on CPUs).
            cache: what becomes of caches when weights grow, see above.
            other_rates: the most prune rates at a time that requests may ask for in addition to the session's. Each
                takes a cache of its own (and no weights), which budgets then count. Default: 2, or none with a budget.
            cache_bits: 8 holds keys and values as int8 with a scale per head and token; 16 in the dtype.
            marks: for models with SSM states, whether each row keeps a second state, at its prompt's end, so that a
                prompt which begins with that one (the next turn of a chat) is read from there on. Attention needs none.
            say: hears `why` before weights are read.

        Raises:
            UserError: a budget that cannot be kept (the message says what it takes), or a folder, rate, context or
                batch that cannot be used.
        """
        if rate is not None and (memory_budget is not None or latency_budget is not None):
            raise UserError("give a rate or budgets, not both")
        seconds = isinstance(latency_budget, numbers.Real) and not isinstance(latency_budget, bool)
        if latency_budget is not None and not (seconds and 0 < latency_budget < float("inf")):
            raise UserError(f"latency_budget must be a number of seconds above 0, not {latency_budget!r}")
        super().__init__(folder, context, batch, dtype, cache, other_rates, cache_bits, marks)
        if memory_budget is not None:
            self._lanes.most = self._needs.batches - 1
        self.why, first = self._first_size(rate, memory_budget, latency_budget is not None)
        say(self.why)
        self.start(first)
        if latency_budget is not None:
            self._fit_latency(float(latency_budget))
            say(self.why)

    def _first_size(self, rate: float | int | None, budget: int | float | str | None, fast: bool) -> tuple[str, Choice]:
        if budget is None:
            first = self._needs.size(check_rate(0.0 if rate is None else rate))  # unsorted ones refuse others than 0
            reason = "as asked for" if rate is not None else "no budget was given"
            return f"{first}: {reason}", first
        limit = parse_budget(budget)
        # Bits save no time, so that a budget of time as well chooses among prune rates.
        need = self._needs.fitting(limit, Sizes(self.checkpoint, rates=True) if fast else None)
        return _fits(need, limit), need.size

    def fit(self, budget: int | float | str, rates: Sequence[float] | None = None) -> Need:
        """Go to the largest size that fits a memory budget.

        Args:
            budget: as `memory_budget`.
            rates: prune rates to choose from (default: those that were warmed up; else every 0.001, or with nested bits
                every setting of the joint plan).

        Returns:
            What the chosen size needs.

        Raises:
            UserError: none fits; the size is as before.
        """
        limit, counted = parse_budget(budget), self._needs.batches - 1
        extra = 0 if counted else self._lanes.cache_bytes()  # of requests at work that no budget counted
        rates = rates or self._warm
        need = self._needs.fitting(limit - extra, sorted(map(check_rate, rates)) if rates else None)
        before, self._lanes.most = self._lanes.most, counted
        try:
            self.set_size(need.size, why=_fits(need, limit))
        except Exception:
            self._lanes.most = before
            raise
        return need

    def _fit_latency(self, budget: float) -> None:
        """The smallest rate from the present one on whose steps are fast enough; all of it is measured."""
        lowest, highest = self.rate, self._needs.highest
        at_lowest = self.seconds_per_token()
        if at_lowest <= budget:
            self.why += f"; {at_lowest * 1e3:.3g} ms a token keep {budget * 1e3:.3g} ms"
            return
        self.set_rate(highest)
        at_highest = self.seconds_per_token()
        if at_highest > budget:
            raise UserError(
                f"{budget * 1e3:.3g} ms a token is too little: prune rate {highest:g} takes {at_highest * 1e3:.3g} ms"
            )
        share = (at_lowest - budget) / max(at_lowest - at_highest, 1e-12)
        rate = lowest + (highest - lowest) * share  # bytes fall evenly with the rate, and time with bytes
        found, seconds = highest, at_highest
        for step in (0.0, 0.05):
            tried = round(min(rate + step, highest), 3)
            if tried < highest:
                self.set_rate(tried)
                if (took := self.seconds_per_token()) <= budget:
                    found, seconds = tried, took
                    break
        self.set_rate(found)
        self.why = f"prune rate {found:g}: {seconds * 1e3:.3g} ms a token keep {budget * 1e3:.3g} ms"

    def watch(self, interval: float | int = 5.0, **settings: Any) -> Watcher:
        """Follow free memory in the background and change the rate; see `watching.Watcher` for the settings."""
        return Watcher(self, interval, **settings).start()

    def generate(
        self,
        prompt: str | Sequence[int] | Int[np.ndarray, " t"] | Int[Array, " t"],
        *,
        max_new_tokens: int = 64,
        temperature: float | int = 0.0,
        top_p: float | int = 1.0,
        top_k: int = 0,
        seed: int = 0,
        tokenizer: Any | None = None,
        chat: bool = False,
        rate: float | int | None = None,
    ) -> Iterator[str] | Iterator[Int[np.ndarray, "1"]]:
        """Stream the continuation of a prompt, as `uniql_jax.generate` does, at whatever rate there is on the way.

        Args:
            prompt: text, or token ids.
            max_new_tokens: the most tokens to make.
            temperature: 0 takes the likeliest token.
            top_p: see `uniql_jax.generate`.
            top_k: see there.
            seed: of the draws.
            tokenizer: default: for text, the one in the checkpoint's folder.
            chat: wrap the prompt in the chat template.
            rate: the prune rate of this text, see `submit`.

        Returns:
            Pieces of text, or int32 arrays [1] where the prompt is of ids and no tokenizer is given.

        Raises:
            UserError: a prompt or settings that cannot be used.
        """
        ids, tokenizer = read_prompt(prompt, tokenizer, self.model.folder, chat)
        settings = Settings(max_new_tokens, temperature, top_p, top_k, seed, frozenset(self.stops(chat)))
        request = self.submit(ids, settings, rate)
        if tokenizer is None:
            return (np.asarray([item.token], np.int32) for item in request)
        return decode_stream(tokenizer, (item.token for item in request), ids.tolist())

    def score(
        self, prompt: Sequence[int] | Int[np.ndarray, " t"], text: Sequence[int] | Int[np.ndarray, " n"]
    ) -> Iterator[float]:
        """Log-probabilities (nats) of the tokens of a text after a prompt, one by one, at whatever rate there is."""
        forced = tuple(int(token) for token in text)
        request = self.submit(prompt, Settings(len(forced), logprobs=0, forced=forced))
        return (float(item.logprob or 0.0) for item in request)

    @property
    def tokenizer(self) -> Any | None:
        """The tokenizer of the checkpoint's folder, if there is one."""
        return folder_tokenizer(self.model.folder)

    def stops(self, chat: bool = False) -> set[int]:
        """Ids that end a text; with `chat`, the tokenizer's own end as well."""
        found = set(stop_ids(self.model))
        if chat and self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            found.add(int(self.tokenizer.eos_token_id))
        return found


def _fits(need: Need, limit: int) -> str:
    which = "the least" if need.size.setting is None else "the largest size"
    return f"{need.size}: {which} that fits {format_bytes(limit)}, it needs {need}"
