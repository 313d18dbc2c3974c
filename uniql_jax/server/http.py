"""HTTP as far as a hostile client could misuse it: bodies, slow senders, keys, foreign pages, streams that hang up."""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import ipaddress
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from uniql_jax.errors import UserError
from uniql_jax.server.errors import ApiError, of_session

log = logging.getLogger(__name__)
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1", "testserver")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one client may take.

    Attributes:
        body_bytes: of a request's body.
        body_seconds: in which headers, and then the body, must have come.
        tokens: new ones of an answer.
        default_tokens: new ones of a chat answer that asks for no number.
        streams: answers at work or waiting, over all clients.
        seconds: that a call may take.
    """

    body_bytes: int = 2**20
    body_seconds: float = 10.0
    tokens: int = 4096
    default_tokens: int = 512
    streams: int = 64
    seconds: float = 600.0


@dataclasses.dataclass(frozen=True)
class Keys:
    """Secrets that callers present; None: none is needed."""

    api: str | None = None
    admin: str | None = None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def authorize(request: Request, keys: Keys, admin: bool = False) -> None:
    """Raise ApiError unless the caller presents the right key, and is no page of another site.

    Without an admin key, the API key serves; the admin key opens everything.
    """
    origin = request.headers.get("origin")
    if origin is not None and _netloc(origin) != request.headers.get("host"):
        raise ApiError(403, "pages of other sites may not call this server", code="foreign_origin")
    wanted = [keys.admin or keys.api] if admin else [keys.api, keys.admin if keys.api else None]
    wanted = [key for key in wanted if key is not None]
    if not wanted:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    given_bytes = given.strip().encode("utf-8", "surrogateescape")
    fits = [hmac.compare_digest(given_bytes, key.encode()) for key in wanted]
    if scheme.lower() != "bearer" or not any(fits):
        raise ApiError(401, "this needs a valid key: Authorization: Bearer KEY", code="invalid_api_key")


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:  # brackets that hold no address
        return None


def check_host(request: Request) -> None:
    """On loopback, refuse names that a foreign page could have made point here (DNS rebinding)."""
    host = request.headers.get("host", "")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if name.lower() not in LOOPBACK:
        raise ApiError(403, "this server answers to localhost and 127.0.0.1 only", code="foreign_host")


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a request, JSON by its own word, neither too large nor too slow. Raises ApiError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be of content type application/json", code="content_type")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ApiError(415, "the body must not be compressed", code="content_encoding")
    too_large = ApiError(413, f"the body exceeds {limits.body_bytes} bytes", code="body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length[:19]) > limits.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body took longer than {limits.body_seconds:g} s", code="timeout") from None
    return bytes(body)


async def disconnected(receive: Receive) -> None:
    """Return once the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """Server-sent events of an async iterator, which ends as soon as the client hangs up or time is over."""

    status_code = 200

    def __init__(self, events: AsyncIterator[Any], seconds: float, close: Callable[[], object]):
        """`close` is called in any case, once nothing more is sent."""
        self._events, self._seconds, self._close = events, seconds, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as an ASGI application."""
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(disconnected(receive))
        try:
            both = {sending, leaving}
            done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED, timeout=self._seconds)
        finally:
            sending.cancel()
            leaving.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            self._close()
        if not done:
            error = ApiError(408, f"the call took longer than {self._seconds:g} s", code="timeout")
            await _event(send, error.body())
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for event in self._events:
                await _event(send, event)
            await _event(send, "[DONE]")
        except UserError as error:
            await _event(send, of_session(error, 500).body())
        except Exception:
            log.exception("a stream failed")
            await _event(send, ApiError(500, "the server failed; its log says why").body())
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _event(send: Send, event: Any) -> None:
    text = event if isinstance(event, str) else json.dumps(event)
    await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})


class SecurityHeaders:
    """Adds headers to every response of an application."""

    def __init__(self, app: ASGIApp, headers: Mapping[str, str]):
        self._app = app
        self._headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as an ASGI application."""

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *self._headers]
            await send(message)

        await self._app(scope, receive, with_headers)


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, which hangs up on connections whose headers do not come in time."""

    header_seconds = 10.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        """Some bytes have come."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif self._timer is None:
            self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._forget()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        self._forget()
        self._timer = self.loop.call_later(self.header_seconds, self._hang_up)

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _hang_up(self) -> None:
        self._timer = None
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.transport.close()
