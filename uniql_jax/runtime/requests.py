"""A request of a running batch: its prompt, how it draws, and the tokens that it was given so far."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from uniql_jax.errors import UserError
from uniql_jax.runtime.sampling import check_sampling, check_seed

TOP_LOGPROBS = 20
"""The most of the likeliest tokens whose log-probabilities a request may ask for."""


class Emitted(NamedTuple):
    """One new token; where log-probabilities were asked for, its own and [(token, log-probability)] of the likeliest.

    `rate` is the prune rate of the weights that made it; at a setting of the joint plan of nested bits the fraction
    that it leaves out, and `steps` how many of the plan it takes.
    """

    token: int
    rate: float
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    steps: int | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a request draws and when it ends.

    Attributes:
        max_new_tokens: the most tokens to make, at least 1.
        temperature: 0 takes the likeliest token, else logits are divided by it and a token is drawn.
        top_p: draw from the fewest tokens whose share reaches this much; 1 is off.
        top_k: draw from so many of the likeliest tokens; 0 is off.
        seed: from 0 to 2**32 - 1; the same seed draws the same tokens, whatever else runs.
        stops: ids that end the text; they are not part of it.
        logprobs: how many of the likeliest tokens to report with log-probabilities (0: of the chosen one only);
            None: nothing is reported.
        forced: tokens to be taken in place of the drawn ones, one after another: for scoring a given text.
    """

    max_new_tokens: int = 64
    temperature: float | int = 0.0
    top_p: float | int = 1.0
    top_k: int = 0
    seed: int = 0
    stops: frozenset[int] = frozenset()
    logprobs: int | None = None
    forced: tuple[int, ...] = ()

    def check(self, vocab_size: int) -> None:
        """Raises UserError for settings that cannot be used."""
        check_sampling(self.temperature, self.top_p, self.top_k, self.max_new_tokens)
        check_seed(self.seed)
        wanted = self.logprobs
        if wanted is not None and not (isinstance(wanted, numbers.Integral) and 0 <= wanted <= TOP_LOGPROBS):
            raise UserError(f"logprobs must be an integer from 0 to {TOP_LOGPROBS}, not {wanted}")
        if any(not 0 <= token < vocab_size for token in self.forced):
            raise UserError(f"forced tokens must be ids of the vocabulary of {vocab_size}")


class Request:
    """What was asked for and what came of it; iterating waits for tokens, and makes them where nobody else does.

    Attributes:
        prompt: token ids.
        settings: how it draws.
        rate: the prune rate that it runs at, whatever becomes of the session's; None: the session's.
        reason: why it ended: "stop" (a stop id), "length", "cancelled" or "error"; None while it runs.
        error: the exception of reason "error".
        cached: tokens of the prompt that were not read, since a row held them.
    """

    def __init__(
        self, prompt: Int[np.ndarray, " t"], settings: Settings, pump: Callable[[], Any], rate: float | None = None
    ):
        self.prompt = prompt
        self.settings = settings
        self.rate = rate
        self.reason: str | None = None
        self.error: BaseException | None = None
        self.cached = 0
        self._emitted: list[Emitted] = []
        self._pump = pump
        self._listener: Callable[[], object] | None = None

    @property
    def tokens(self) -> list[int]:
        """What it was given so far."""
        return [item.token for item in self._emitted]

    @property
    def made(self) -> int:
        """How many tokens it was given so far."""
        return len(self._emitted)

    @property
    def length(self) -> int:
        """Tokens that its row holds: the prompt and all but the last new one, which is still to be read."""
        return len(self.prompt) + max(len(self._emitted) - 1, 0)

    @property
    def text(self) -> Int[np.ndarray, " t"]:
        """Those tokens."""
        return np.concatenate([self.prompt, np.asarray(self.tokens[:-1], np.int32)]).astype(np.int32)

    def forced(self, start: int, count: int) -> Sequence[int]:
        """The forced tokens from number `start` on, -1 where the model chooses."""
        given = self.settings.forced[start : start + count]
        return (*given, *(-1,) * (count - len(given)))

    def push(self, item: Emitted) -> None:
        """Give it a token; a stop id ends it."""
        if self.reason is not None:
            return
        if item.token in self.settings.stops:
            self.finish("stop")
            return
        self._emitted.append(item)
        if len(self._emitted) >= self.settings.max_new_tokens:
            self.finish("length")
        elif self._listener:
            self._listener()

    def finish(self, reason: str, error: BaseException | None = None) -> None:
        """End it, once."""
        if self.reason is None:
            self.error = error
            self.reason = reason
            if self._listener:
                self._listener()

    def cancel(self) -> None:
        """End it; its row is free at the next step. Any thread may ask, also after its end."""
        self.finish("cancelled")

    def listen(self, listener: Callable[[], object]) -> None:
        """Call this whenever there is something new, from the thread that makes it; it must not block."""
        self._listener = listener
        listener()

    def take(self, start: int) -> list[Emitted]:
        """What it was given from token number `start` on."""
        return self._emitted[start:]

    def __iter__(self) -> Iterator[Emitted]:
        """Tokens as they come; raises what went wrong. Leaving early cancels it."""
        given = 0
        try:
            while True:
                ended = self.reason is not None  # read first: what came before the end is still handed out
                new = self.take(given)
                given += len(new)
                yield from new
                if not new and ended:
                    break
                if not new:
                    self._pump()
        finally:
            self.cancel()
        if self.error is not None:
            raise self.error
