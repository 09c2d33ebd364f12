"""JSON as HTTP answers; errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from tokasaurus.errors import (
    Conflict,
    EngineError,
    EngineNotReady,
    EngineOverloaded,
    NotFound,
    RequestError,
    RequestTooLong,
    StorageFull,
    TokasaurusError,
)

__all__ = [
    "BodyTooLarge",
    "ClientGone",
    "HeadTooLarge",
    "ReadTimeout",
    "TimeIsUp",
    "Unauthorized",
    "UnknownModel",
    "WrongMediaType",
    "error_answer",
    "error_body",
    "error_status",
    "install_error_handlers",
    "json_answer",
]

_RETRY_AFTER_S = 5
# Errors quote what is wrong, and a client may send megabytes of it.
_MAX_MESSAGE_CHARS = 2_000
_MAX_PARAM_CHARS = 200


class WrongMediaType(RequestError):
    """The body is not declared to be what the route reads, or it is compressed."""


class BodyTooLarge(RequestError):
    """The body is larger than the server is willing to hold."""


class Unauthorized(RequestError):
    """The request brings none of the server's keys."""


class ClientGone(TokasaurusError):
    """The client disconnected: whatever is answered, nobody reads it."""


class TimeIsUp(TokasaurusError):
    """The request took longer than any may."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(
            f"the request did not finish within request_timeout_s={limit_s:g}; ask for fewer tokens or"
            " samples, or try when there is less to do"
        )


class ReadTimeout(TokasaurusError):
    """A request came too slowly."""

    def __init__(self, part: str, limit_s: float) -> None:
        super().__init__(f"the {part} of the request did not come on within {limit_s:g} s")


class HeadTooLarge(RequestError):
    """A request has more headers than the server is willing to hold."""


class UnknownModel(RequestError):
    """There is no model of this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the model {name!r} does not exist", "model")


# The first that fits.
_STATUSES: dict[type[Exception], int] = {
    Unauthorized: 401,
    NotFound: 404,
    UnknownModel: 404,
    Conflict: 409,
    BodyTooLarge: 413,
    WrongMediaType: 415,
    HeadTooLarge: 431,
    RequestError: 400,
    TimeIsUp: 408,
    ReadTimeout: 408,
    ClientGone: 499,
    EngineOverloaded: 429,
    StorageFull: 507,
    EngineError: 503,
    Exception: 500,
}
_CODES = {
    RequestTooLong: "context_length_exceeded",
    UnknownModel: "model_not_found",
    Unauthorized: "invalid_api_key",
}


def error_body(error: Exception) -> dict[str, Any]:
    """What a client is told of an error; of an unexpected one, nothing."""
    if isinstance(error, RequestError):
        code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), None)
        return _body(error.message, "invalid_request_error", error.field, code)
    if isinstance(error, EngineOverloaded):
        return _body(str(error), "rate_limit_error", None, "rate_limit_exceeded")
    if isinstance(error, (TimeIsUp, ReadTimeout)):
        return _body(str(error), "timeout_error", None, "request_timeout")
    if isinstance(error, StorageFull):
        return _body(str(error), "insufficient_storage", None, "storage_full")
    if isinstance(error, EngineError):
        return _body(str(error), "service_unavailable", None, None)
    return _body("internal error; the server's log says more", "internal_error", None, None)


def error_status(error: Exception) -> int:
    """The HTTP status of an error."""
    return next(status for kind, status in _STATUSES.items() if isinstance(error, kind))


def json_answer(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A whole answer, on one line."""
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def error_answer(error: Exception) -> Response:
    """The whole answer to a request that ends with an error."""
    headers = {}
    if isinstance(error, EngineNotReady):
        headers["Retry-After"] = str(_RETRY_AFTER_S)
    elif isinstance(error, EngineOverloaded):
        headers["Retry-After"] = str(error.retry_after_s)
    elif isinstance(error, (TimeIsUp, StorageFull)):
        headers["X-Should-Retry"] = "false"  # OpenAI's clients would send the same again
    elif isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return json_answer(error_body(error), error_status(error), headers)


def install_error_handlers(app: FastAPI) -> None:
    """Makes every error of an application come out in OpenAI's shape."""

    def tokasaurus_error(request: Request, error: Exception) -> Response:
        return error_answer(error)

    def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = f"{request.method} {request.url.path}"
        message = {404: f"no such route: {path}", 405: f"method not allowed: {path}"}.get(
            error.status_code, str(error.detail)
        )
        body = _body(message, "invalid_request_error", None, None)
        return json_answer(body, error.status_code, error.headers)

    def unexpected_error(request: Request, error: Exception) -> Response:
        # Starlette raises it again behind this answer, and uvicorn logs it.
        return json_answer(error_body(error), 500)

    app.add_exception_handler(TokasaurusError, tokasaurus_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unexpected_error)


def _body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    error = {"message": _cut(message, _MAX_MESSAGE_CHARS), "type": kind, "param": param}
    if param is not None:
        error["param"] = _cut(param, _MAX_PARAM_CHARS)
    return {"error": {**error, "code": code}}


def _cut(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else text[:max_chars] + "..."
