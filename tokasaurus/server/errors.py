"""The errors that a client may get: the server's own, and what each error is called in an answer.

The body has OpenAI's shape, ``{"error": {"message", "type", "param", "code"}}``. Body and status
belong to every answer, also to a line of a batch; what HTTP adds is in ``http.answers``.
"""

from __future__ import annotations

from typing import Any

from tokasaurus.errors import (
    Conflict,
    EngineError,
    EngineOverloaded,
    NotFound,
    RequestError,
    RequestTooLong,
    SourceUnavailable,
    StorageFull,
    TokasaurusError,
)

__all__ = [
    "BodyTooLarge",
    "ClientGone",
    "CommandTimeout",
    "Forbidden",
    "ForeignPage",
    "HeadTooLarge",
    "Misdirected",
    "ReadTimeout",
    "TimeIsUp",
    "Unauthorized",
    "WrongMediaType",
    "described",
    "error_body",
    "error_status",
]

# An error quotes what is wrong, and a client may send megabytes of it.
_MAX_MESSAGE_CHARS = 2_000
_MAX_PARAM_CHARS = 200


class WrongMediaType(RequestError):
    """The body is compressed, or not declared to be what the route reads."""


class BodyTooLarge(RequestError):
    """The body is larger than the server is willing to hold."""


class HeadTooLarge(RequestError):
    """A request has more headers than the server is willing to hold."""


class Unauthorized(RequestError):
    """The request carries none of the server's keys."""


class Forbidden(RequestError):
    """The request needs an admin key, or must not come from where it comes."""


class ForeignPage(RequestError):
    """A web page that the engine does not know sends the request."""


class Misdirected(RequestError):
    """The request names another host than this one."""


class ClientGone(TokasaurusError):
    """The client disconnected, so nothing reads the answer."""


class TimeIsUp(TokasaurusError):
    """The request took longer than a request may."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(
            f"the request did not finish within request_timeout_s={limit_s:g}; ask for fewer tokens"
            " or samples, or try when there is less to do"
        )


class CommandTimeout(TokasaurusError):
    """The engine has not carried out a command in time."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(
            f"the engine has not carried this out within {limit_s:g} s; it goes on, and there is"
            " no need to ask again"
        )


class ReadTimeout(TokasaurusError):
    """A request came too slowly."""

    def __init__(self, part: str, limit_s: float) -> None:
        super().__init__(f"the {part} of the request did not come on within {limit_s:g} s")


# The first that fits.
_STATUSES: dict[type[Exception], int] = {
    Unauthorized: 401,
    Forbidden: 403,
    ForeignPage: 403,
    NotFound: 404,
    Conflict: 409,
    BodyTooLarge: 413,
    WrongMediaType: 415,
    Misdirected: 421,
    HeadTooLarge: 431,
    RequestError: 400,
    TimeIsUp: 408,
    ReadTimeout: 408,
    ClientGone: 499,
    EngineOverloaded: 429,
    StorageFull: 507,
    SourceUnavailable: 502,
    EngineError: 503,
    CommandTimeout: 504,
    Exception: 500,
}
_CODES = {
    RequestTooLong: "context_length_exceeded",
    Unauthorized: "invalid_api_key",
    Forbidden: "admin_key_required",
    ForeignPage: "origin_not_allowed",
    Misdirected: "host_not_allowed",
}


def error_status(error: Exception) -> int:
    """The status code of an error."""
    return next(status for kind, status in _STATUSES.items() if isinstance(error, kind))


def error_body(error: Exception) -> dict[str, Any]:
    """What a client is told of an error. An unexpected error is not described."""
    if isinstance(error, RequestError):
        code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), None)
        return described(error.message, "invalid_request_error", error.field, code)
    if isinstance(error, EngineOverloaded):
        return described(str(error), "rate_limit_error", code="rate_limit_exceeded")
    if isinstance(error, (TimeIsUp, ReadTimeout)):
        return described(str(error), "timeout_error", code="request_timeout")
    if isinstance(error, CommandTimeout):
        return described(str(error), "timeout_error", code="command_timeout")
    if isinstance(error, StorageFull):
        return described(str(error), "insufficient_storage", code="storage_full")
    if isinstance(error, SourceUnavailable):
        return described(str(error), "bad_gateway", "cartridges", "source_unavailable")
    if isinstance(error, EngineError):
        return described(str(error), "service_unavailable")
    return described("internal error; the server's log says more", "internal_error")


def described(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error in OpenAI's shape.

    Args:
        message: for people.
        kind: one of the error types that clients know.
        param: the field at fault, if one is.
        code: for programs, where there is one.
    """
    error = {"message": _cut(message, _MAX_MESSAGE_CHARS), "type": kind, "param": param}
    if param is not None:
        error["param"] = _cut(param, _MAX_PARAM_CHARS)
    return {"error": {**error, "code": code}}


def _cut(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else text[:max_chars] + "..."
