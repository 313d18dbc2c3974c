"""One answer as it grows: text, stop strings, log-probabilities, and the JSON that they are sent as."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from uniql_jax.runtime.requests import Emitted, Request
from uniql_jax.runtime.text import TextStream
from uniql_jax.server.schemas import finite
from uniql_jax.server.worker import listen


class StopFilter:
    """Text up to the first of some stop strings; what may be the beginning of one waits."""

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held = [stop for stop in stops if stop], ""
        self.stopped = False

    def push(self, text: str, last: bool = False) -> str:
        """The text that may be shown now; `last`: nothing follows."""
        if self.stopped:
            return ""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            return self._held[: min(places)]
        longest = 0 if last else max(map(self._overlap, self._stops), default=0)
        cut = len(self._held) - longest
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of what is held that begins a stop string."""
        sizes = range(min(len(stop) - 1, len(self._held)), 0, -1)
        return next((size for size in sizes if self._held.endswith(stop[:size])), 0)


@dataclasses.dataclass
class Delta:
    """What an answer grew by: text, the tokens that it was made of, and at the end why it ended."""

    text: str = ""
    tokens: list[Emitted] = dataclasses.field(default_factory=list)
    finish: str | None = None


class Choice:
    """One of a call's answers."""

    def __init__(self, index: int, request: Request, tokenizer: Any, stops: Sequence[str]):
        self.index, self.request = index, request
        self.tokens = 0
        self.sizes: list[str] = []
        self._text = TextStream(tokenizer, request.prompt.tolist())
        self._filter = StopFilter(stops)

    async def deltas(self, count: Callable[[list[Emitted]], None]) -> AsyncIterator[Delta]:
        """What comes, piece by piece; the last one has a finish reason."""
        waiting: list[Emitted] = []
        async for items in listen(self.request, count):
            for item in items:
                self.tokens += 1
                size = f"{item.rate:g}" if item.steps is None else f"steps-{item.steps}"
                if size not in self.sizes:
                    self.sizes.append(size)
                waiting.append(item)
                shown = self._filter.push(self._text.push(item.token))
                if self._filter.stopped:
                    self.request.cancel()
                    yield Delta(shown, [] if not shown else waiting[:-1], "stop")
                    return
                if shown:
                    yield Delta(shown, waiting)
                    waiting = []
        rest = self._filter.push(self._text.end(), last=True)
        reason = {"length": "length", "stop": "stop"}.get(self.request.reason or "", "stop")
        yield Delta(rest, waiting, "stop" if self._filter.stopped else reason)


def token_text(tokenizer: Any, token: int) -> str:
    """A token by itself."""
    return tokenizer.decode([token], clean_up_tokenization_spaces=False)


def completion_logprobs(tokenizer: Any, items: Sequence[Emitted], offset: int) -> dict[str, Any]:
    """Log-probabilities as /v1/completions has them; `offset`: characters before the first token."""
    texts = [token_text(tokenizer, item.token) for item in items]
    offsets = [offset + sum(map(len, texts[:i])) for i in range(len(texts))]
    return {
        "tokens": texts,
        "token_logprobs": [finite(item.logprob or 0.0) for item in items],
        "top_logprobs": [{token_text(tokenizer, t): finite(p) for t, p in item.top} for item in items],
        "text_offset": offsets,
    }


def chat_logprobs(tokenizer: Any, items: Sequence[Emitted]) -> dict[str, Any]:
    """Log-probabilities as /v1/chat/completions has them."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text = token_text(tokenizer, token)
        return {"token": text, "logprob": finite(logprob or 0.0), "bytes": list(text.encode("utf-8", "replace"))}

    content = [entry(item.token, item.logprob) | {"top_logprobs": [entry(t, p) for t, p in item.top]} for item in items]
    return {"content": content, "refusal": None}
