"""Steps on their way: which variant serves which requests, and who gets the tokens once they are there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import jax
import numpy as np

from uniql_jax.errors import UserError
from uniql_jax.runtime.choice import Choice
from uniql_jax.runtime.requests import TOP_LOGPROBS, Emitted, Request
from uniql_jax.runtime.sampling import NOT_FINITE
from uniql_jax.runtime.steps import Chosen, Variant


@dataclasses.dataclass
class Flight:
    """A step whose tokens the host has not looked at: what it chose, for which requests, from which token number on."""

    chosen: Chosen
    rows: list[tuple[int, Request, int]]
    size: Choice

    def hand_out(self) -> None:
        """Wait for the tokens and give them to the requests."""
        tokens = np.asarray(self.chosen.token)
        scores = None if self.chosen.top is None else jax.tree.map(np.asarray, self.chosen)
        for i, request, start in self.rows:
            _hand_out(request, start, i, tokens, scores, self.size)


def every_variant() -> list[Variant]:
    """Those that requests may need."""
    return [Variant(greedy, top) for greedy in (True, False) for top in (None, TOP_LOGPROBS)]


def variant_of(requests: Iterable[Request]) -> Variant:
    """The variant of a step that serves these requests together."""
    settings = [request.settings for request in requests]
    wanted = any(s.logprobs is not None for s in settings)
    return Variant(all(s.temperature == 0 for s in settings), TOP_LOGPROBS if wanted else None)


def _hand_out(request: Request, start: int, i: int, tokens: np.ndarray, scores: Chosen | None, size: Choice) -> None:
    for j, token in enumerate(tokens[i].tolist()):
        if request.reason is not None:
            return
        if start + j < request.made:
            continue
        if token < 0:
            request.finish("error", UserError(NOT_FINITE))
        elif scores is None or request.settings.logprobs is None:
            request.push(Emitted(token, size.shown_rate, steps=size.steps))
        else:
            count = request.settings.logprobs
            ids, values = scores.top_token[i, j, :count].tolist(), scores.top[i, j, :count].tolist()
            top = tuple(zip(ids, values, strict=True))
            request.push(Emitted(token, size.shown_rate, float(scores.logprob[i, j]), top, size.steps))
