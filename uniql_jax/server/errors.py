"""Errors as clients see them: OpenAI's JSON, one sentence each, nothing of the server's insides."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from uniql_jax.errors import UserError
from uniql_jax.runtime.lanes import RateUnavailable

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a request is answered with when it cannot be served."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None):
        super().__init__(_sendable(message))
        param = None if param is None else _sendable(param)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(self.status)
        if self.status in (408, 413):  # what is left of the body is not read
            headers = {"Connection": "close"}
        return JSONResponse(self.body(), self.status, headers)


def _sendable(text: str) -> str:
    """A text that may quote what a client sent: on one line, and what is no Unicode, such as half a pair, escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def of_session(error: UserError, status: int = 400) -> ApiError:
    """What a session refuses, as clients see it; `status` is for all but prune rates that it cannot give."""
    if not isinstance(error, RateUnavailable):
        return ApiError(status, str(error))
    if error.busy:
        return ApiError(429, str(error), code="too_many_rates", param="model")
    return ApiError(409, str(error), code="rate_not_held", param="model")
