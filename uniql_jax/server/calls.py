"""OpenAI's two calls: from a checked body to answers, whole or as a stream."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from uniql_jax.errors import UserError
from uniql_jax.runtime.requests import Emitted, Settings
from uniql_jax.runtime.text import chat_text, encode
from uniql_jax.server.choices import Choice, Delta, chat_logprobs, completion_logprobs
from uniql_jax.server.errors import ApiError
from uniql_jax.server.http import Limits
from uniql_jax.server.metrics import Metrics
from uniql_jax.server.schemas import Chat, Completion, Generation
from uniql_jax.server.worker import Worker

LEAST_TOP_P = 1e-6
"""OpenAI's top_p of 0 takes the likeliest token, and so does this."""


class Style(Protocol):
    """How a call's answers look in JSON."""

    def whole(self, choice: Choice, text: str, tokens: Sequence[Emitted], finish: str) -> dict[str, Any]:
        """A finished choice."""
        ...

    def part(self, choice: Choice, delta: Delta, offset: int, first: bool) -> dict[str, Any]:
        """A choice in a chunk of a stream."""
        ...


class CompletionStyle:
    """Answers of /v1/completions."""

    object, chunk, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, tokenizer: Any, logprobs: bool):
        self._tokenizer, self._logprobs = tokenizer, logprobs

    def whole(self, choice: Choice, text: str, tokens: Sequence[Emitted], finish: str) -> dict[str, Any]:
        """A finished choice."""
        return self.part(choice, Delta(text, list(tokens), finish), 0, False)

    def part(self, choice: Choice, delta: Delta, offset: int, first: bool) -> dict[str, Any]:
        """A choice in a chunk of a stream."""
        scores = completion_logprobs(self._tokenizer, delta.tokens, offset) if self._logprobs else None
        return {"index": choice.index, "text": delta.text, "logprobs": scores, "finish_reason": delta.finish}


class ChatStyle:
    """Answers of /v1/chat/completions."""

    object, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, tokenizer: Any, logprobs: bool):
        self._tokenizer, self._logprobs = tokenizer, logprobs

    def _scores(self, tokens: Sequence[Emitted]) -> dict[str, Any] | None:
        return chat_logprobs(self._tokenizer, tokens) if self._logprobs else None

    def whole(self, choice: Choice, text: str, tokens: Sequence[Emitted], finish: str) -> dict[str, Any]:
        """A finished choice."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": choice.index, "message": message, "logprobs": self._scores(tokens), "finish_reason": finish}

    def part(self, choice: Choice, delta: Delta, offset: int, first: bool) -> dict[str, Any]:
        """A choice in a chunk of a stream."""
        content: dict[str, Any] = {"role": "assistant"} if first else {}
        if delta.text or first:
            content["content"] = delta.text
        scores = self._scores(delta.tokens)
        return {"index": choice.index, "delta": content, "logprobs": scores, "finish_reason": delta.finish}


class Call:
    """One call: its answers are submitted when it is made."""

    def __init__(
        self,
        worker: Worker,
        metrics: Metrics,
        body: Generation,
        prompts: Sequence[list[int]],
        settings: Callable[[int], Settings],
        style: CompletionStyle | ChatStyle,
        rate: float | None,
    ):
        self._worker, self._metrics, self._style = worker, metrics, style
        self._start, self._model, self._first = time.monotonic(), body.model, True
        self._id, self._created = f"{style.prefix}-{secrets.token_hex(12)}", int(time.time())
        self.prompt_tokens = sum(map(len, prompts))
        self._each = body.n or 1
        self._choices: list[Choice] = []
        stops = body.stop if isinstance(body.stop, list) else []
        try:
            for prompt in prompts:
                for i in range(self._each):
                    request = worker.submit(prompt, settings(i), rate)
                    choice = Choice(len(self._choices), request, worker.session.tokenizer, stops)
                    self._choices.append(choice)
        except UserError:
            self.cancel()
            raise
        metrics.prompt_tokens.inc(self.prompt_tokens)

    def cancel(self) -> None:
        """End all answers."""
        for choice in self._choices:
            choice.request.cancel()

    def _count(self, new: list[Emitted]) -> None:
        if self._first:
            self._first = False
            self._metrics.first_token.observe(time.monotonic() - self._start)
        self._worker.count(len(new))
        self._metrics.generated_tokens.inc(len(new))
        for rate, count in collections.Counter(item.rate for item in new).items():
            self._metrics.tokens_at.labels(f"{rate:g}").inc(count)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _fingerprint(self) -> str:
        """At which prune rates the answers were made, in the order of use; or after how many steps of a joint plan."""
        sizes = dict.fromkeys(size for choice in self._choices for size in choice.sizes)
        return "uniql-rate-" + ",".join(sizes or [self._worker.session.size.label.removeprefix("rate-")])

    def _cached(self) -> int:
        """Tokens of the prompts that were not read for their first answers."""
        return sum(choice.request.cached for choice in self._choices[:: self._each])

    def _usage(self) -> dict[str, Any]:
        new = sum(choice.tokens for choice in self._choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
            "prompt_tokens_details": {"cached_tokens": self._cached()},
        }

    def _ended(self) -> None:
        self.cancel()
        self._metrics.cached_tokens.inc(self._cached())
        self._metrics.duration.observe(time.monotonic() - self._start)

    async def whole(self) -> dict[str, Any]:
        """All answers at once."""

        async def one(choice: Choice) -> dict[str, Any]:
            text, tokens, finish = "", [], "stop"
            async for delta in choice.deltas(self._count):
                text, tokens, finish = text + delta.text, tokens + delta.tokens, delta.finish or finish
            return self._style.whole(choice, text, tokens, finish)

        try:
            choices = await asyncio.gather(*map(one, self._choices))
        finally:
            self._ended()
        head = self._head(self._style.object) | {"system_fingerprint": self._fingerprint()}
        return head | {"choices": choices, "usage": self._usage()}

    async def stream(self, with_usage: bool) -> AsyncIterator[dict[str, Any]]:
        """Chunks of all answers, in the order in which they are made."""
        queue: asyncio.Queue[dict[str, Any] | BaseException | None] = asyncio.Queue(64)

        async def one(choice: Choice) -> None:
            offset, first = 0, True
            try:
                async for delta in choice.deltas(self._count):
                    await queue.put(self._style.part(choice, delta, offset, first))
                    offset, first = offset + len(delta.text), False
                await queue.put(None)
            except Exception as error:
                await queue.put(error)

        tasks, left, ended = [asyncio.ensure_future(one(choice)) for choice in self._choices], len(self._choices), False
        try:
            while left:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    left -= 1
                    continue
                chunk = self._head(self._style.chunk) | {"system_fingerprint": self._fingerprint(), "choices": [item]}
                yield chunk | ({"usage": None} if with_usage else {})
            if with_usage:
                yield self._head(self._style.chunk) | {"choices": [], "usage": self._usage()}
            ended = True
        finally:
            if not ended:
                self._metrics.cancelled.inc()
            self._ended()
            for task in tasks:
                task.cancel()


def _new_tokens(asked: int | None, default: int, prompts: Sequence[list[int]], worker: Worker, limits: Limits) -> int:
    """How many tokens an answer may have. Raises ApiError where that is too many."""
    context, longest = worker.session.shape.context, max(map(len, prompts))
    if asked is not None and asked > limits.tokens:
        raise ApiError(400, f"max_tokens is at most {limits.tokens} here, not {asked}", param="max_tokens")
    if longest + (asked or 1) > context:
        raise ApiError(
            400,
            f"{longest} prompt tokens and {asked or 1} new ones exceed this server's context of {context}",
            code="context_length_exceeded",
        )
    return asked or min(default, limits.tokens, context - longest)


def _settings(body: Generation, new: int, stops: set[int], logprobs: int | None) -> Callable[[int], Settings]:
    """The i-th of n answers' settings; its seed is i more."""
    base = Settings(
        max_new_tokens=new,
        temperature=1.0 if body.temperature is None else float(body.temperature),
        top_p=1.0 if body.top_p is None else max(float(body.top_p), LEAST_TOP_P),
        top_k=body.top_k or 0,
        stops=frozenset(stops),
        logprobs=logprobs,
    )
    seed = secrets.randbits(32) if body.seed is None else body.seed

    def of(i: int) -> Settings:
        return dataclasses.replace(base, seed=(seed + i) % 2**32)

    return of


def completion(worker: Worker, metrics: Metrics, limits: Limits, body: Completion, rate: float | None) -> Call:
    """A call of /v1/completions, at a prune rate or at whatever there is. Raises ApiError or UserError."""
    session, tokenizer = worker.session, worker.session.tokenizer
    prompts = [encode(tokenizer, text) if isinstance(text, str) else list(text) for text in body.prompts]
    if not all(prompts):
        raise ApiError(400, "the prompt is empty", param="prompt")
    new = _new_tokens(body.max_tokens, 16, prompts, worker, limits)
    style = CompletionStyle(tokenizer, body.logprobs is not None)
    return Call(worker, metrics, body, prompts, _settings(body, new, session.stops(), body.logprobs), style, rate)


def chat(worker: Worker, metrics: Metrics, limits: Limits, body: Chat, rate: float | None) -> Call:
    """A call of /v1/chat/completions, at a prune rate or at whatever there is. Raises ApiError or UserError."""
    session, tokenizer = worker.session, worker.session.tokenizer
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    prompt = encode(tokenizer, chat_text(tokenizer, [message.plain() for message in body.messages]), False)
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    new = _new_tokens(asked, limits.default_tokens, [prompt], worker, limits)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    style = ChatStyle(tokenizer, bool(body.logprobs))
    settings = _settings(body, new, session.stops(chat=True), logprobs)
    return Call(worker, metrics, body, [prompt], settings, style, rate)
