"""The server's application: routes, and the state that they share."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from uniql_jax.errors import UserError
from uniql_jax.runtime.budget import free_memory
from uniql_jax.runtime.session import Elastic
from uniql_jax.runtime.text import chat_text
from uniql_jax.server import calls
from uniql_jax.server.errors import ApiError, of_session
from uniql_jax.server.http import (
    EventStream,
    Keys,
    Limits,
    SecurityHeaders,
    authorize,
    check_host,
    disconnected,
    read_body,
)
from uniql_jax.server.metrics import Metrics
from uniql_jax.server.models import entries, listed_rates, setting_of
from uniql_jax.server.schemas import Chat, Completion, Generation, Setting, parse
from uniql_jax.server.worker import Worker

STATIC = Path(__file__).parent / "static"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


class Server:
    """A session behind HTTP."""

    def __init__(
        self,
        session: Elastic,
        name: str,
        *,
        keys: Keys = Keys(),  # noqa: B008  frozen
        limits: Limits = Limits(),  # noqa: B008  frozen
        loopback: bool = True,
        quality: Mapping[float, float] | None = None,
    ):
        """Put routes around a session.

        Args:
            session: loaded; the server runs it.
            name: what clients call the model.
            keys: what callers must present.
            limits: of each call.
            loopback: whether only this machine can reach the server; then foreign host names are refused.
            quality: prune rate -> measured perplexity, for the page.

        Raises:
            UserError: the checkpoint has no tokenizer.
        """
        if session.tokenizer is None:  # loads it, so that the first call need not
            raise UserError(f"{session.model.folder} has no tokenizer, which a server needs")
        self.session, self.name, self.keys, self.limits = session, name, keys, limits
        self.loopback, self.quality = loopback, dict(quality or {})
        self.worker = Worker(session)
        self.metrics = Metrics(self.worker)
        self.chat = _chats(session.tokenizer)
        self.streams, self._started = 0, int(time.time())

    def app(self) -> Starlette:
        """The ASGI application; the worker runs from its start to its end."""
        routes = [
            self._route("/v1/completions", self.completions, "POST"),
            self._route("/v1/chat/completions", self.chat_completions, "POST"),
            self._route("/v1/models", self.models),
            self._route("/v1/models/{model}", self.model),
            self._route("/status", self.status),
            self._route("/metrics", self.prometheus),
            self._route("/admin/rate", self.set_rate, "POST", admin=True),
            self._route("/health", self.health, open_to_all=True),
            Mount("/", StaticFiles(directory=STATIC, html=True)),
        ]
        handlers: Any = {ApiError: self._api_error, UserError: self._user_error, HTTPException: self._http_error}
        handlers |= {Exception: self._failure}
        middleware = [Middleware(SecurityHeaders, headers=HEADERS)]
        return Starlette(routes=routes, exception_handlers=handlers, middleware=middleware, lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.worker.start()
        try:
            yield
        finally:
            await run_in_threadpool(self.worker.stop)

    # ---------------------------------------------------------------------------------------------- around routes

    def _route(
        self,
        path: str,
        handler: Callable[[Request], Awaitable[Any]],
        method: str = "GET",
        admin: bool = False,
        open_to_all: bool = False,
    ) -> Route:
        async def run(request: Request) -> Any:
            try:
                if self.loopback:
                    check_host(request)
                if not open_to_all:
                    authorize(request, self.keys, admin)
                response = await handler(request)
            except ClientDisconnect:
                self.metrics.cancelled.inc()
                return Response(status_code=499)
            except Exception as error:
                self.metrics.requests.labels(path, str(_status(error))).inc()
                raise
            self.metrics.requests.labels(path, str(getattr(response, "status_code", 200))).inc()
            return response

        return Route(path, run, methods=[method])

    async def _api_error(self, request: Request, error: Any) -> Response:
        return error.response()

    async def _user_error(self, request: Request, error: Any) -> Response:
        return of_session(error).response()

    async def _http_error(self, request: Request, error: Any) -> Response:
        return ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}").response()

    async def _failure(self, request: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed; its log says why").response()

    # ---------------------------------------------------------------------------------------------- OpenAI's calls

    async def completions(self, request: Request) -> Any:
        """POST /v1/completions."""
        body = parse(Completion, await read_body(request, self.limits))
        return await self._answer(request, body, len(body.prompts) * (body.n or 1), calls.completion)

    async def chat_completions(self, request: Request) -> Any:
        """POST /v1/chat/completions."""
        body = parse(Chat, await read_body(request, self.limits))
        return await self._answer(request, body, body.n or 1, calls.chat)

    async def _answer(self, request: Request, body: Generation, count: int, make: Callable[..., calls.Call]) -> Any:
        rate = self._asked_rate(body.model)
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options")
        if self.streams + count > self.limits.streams:
            raise ApiError(429, f"{self.limits.streams} answers are at work already", code="too_many_streams")
        self.streams += count
        try:
            call = await run_in_threadpool(make, self.worker, self.metrics, self.limits, body, rate)
        except BaseException:
            self.streams -= count
            raise
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return EventStream(call.stream(usage), self.limits.seconds, lambda: self._end(call, count))
        try:
            return JSONResponse(await self._until_gone(request, call))
        finally:
            self._end(call, count)

    def _end(self, call: calls.Call, count: int) -> None:
        call.cancel()
        self.streams -= count

    async def _until_gone(self, request: Request, call: calls.Call) -> Any:
        """The whole answer, unless the client hangs up or time is over first."""
        answer = asyncio.ensure_future(call.whole())
        leaving = asyncio.ensure_future(disconnected(request.receive))
        try:
            await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED, timeout=self.limits.seconds)
            if answer.done():
                return answer.result()
            if leaving.done():
                raise ClientDisconnect
            raise ApiError(408, f"the call took longer than {self.limits.seconds:g} s", code="timeout")
        finally:
            for task in (answer, leaving):
                task.cancel()
            await asyncio.gather(answer, leaving, return_exceptions=True)

    # ---------------------------------------------------------------------------------------------- models

    def _asked_rate(self, model: str) -> float | None:
        """The prune rate that a model's name asks for; None: whatever there is. Raises ApiError for another model."""
        if model == self.name:
            return None
        for rate in listed_rates(self.session):
            if model == f"{self.name}@{rate:g}":
                return rate
        raise ApiError(404, f"no model {model[:100]!r}; this server has {self.name}", code="model_not_found")

    def _entries(self) -> list[dict[str, Any]]:
        about = {"object": "model", "created": self._started, "owned_by": "uniql-jax"}
        return [about | one for one in entries(self.session, self.name, self.quality)]

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": self._entries()})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        wanted = request.path_params["model"]
        for found in self._entries():
            if found["id"] == wanted:
                return JSONResponse(found)
        raise ApiError(404, f"no model {wanted[:100]!r}; this server has {self.name}", code="model_not_found")

    # ---------------------------------------------------------------------------------------------- operation

    async def health(self, request: Request) -> Response:
        """GET /health: whether it can answer; without a key."""
        alive = self.worker.alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def status(self, request: Request) -> Response:
        """GET /status: what the page shows."""
        session = self.session
        found = {"model": self.name, "rate": session.rate, "why": session.why, "highest_rate": session.highest_rate}
        found |= {"size": str(session.size), "setting": setting_of(session.size), "weight_bytes": session.size.bytes}
        found |= {"nested": session.checkpoint.joint_plan is not None, "cache_bits": session.shape.bits}
        found |= {"context": session.shape.context, "rows": session.shape.rows, "warm_rates": session.warm_rates}
        found |= {"tokens_per_second": round(self.worker.tokens_per_second(), 2), "memory": session.memory()}
        found["chat"] = self.chat
        found["active_at"] = {f"{rate:g}": count for rate, count in session.active_at().items()}
        found |= {"free_memory": await run_in_threadpool(free_memory), "streams": self.streams} | session.load_now()
        found["sizes"] = {f"{rate:g}": session.checkpoint.weight_bytes(rate) for rate in listed_rates(self.session)}
        found["perplexity"] = {f"{rate:g}": value for rate, value in self.quality.items()}
        return JSONResponse(found)

    async def prometheus(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def set_rate(self, request: Request) -> Response:
        """POST /admin/rate: {"rate": R} or {"memory_budget": SIZE}."""
        body = parse(Setting, await read_body(request, self.limits))
        rate, budget, before = body.rate, body.memory_budget, self.session.size
        if rate is not None and budget is None:
            await run_in_threadpool(self.session.set_rate, round(rate, 6))
        elif budget is not None and rate is None:
            await run_in_threadpool(self.session.fit, budget)
        else:
            raise ApiError(400, "give either rate or memory_budget")
        session = self.session
        if session.size != before:
            self.metrics.switches.inc()
        found = {"rate": session.rate, "setting": setting_of(session.size), "weight_bytes": session.size.bytes}
        return JSONResponse(found | {"why": session.why, "memory": session.memory()})


def _chats(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template."""
    try:
        return bool(chat_text(tokenizer, [{"role": "user", "content": "?"}]))
    except UserError:
        return False


def _status(error: Exception) -> int:
    return (
        getattr(error, "status", None)
        or getattr(error, "status_code", None)
        or (of_session(error).status if isinstance(error, UserError) else 500)
    )
