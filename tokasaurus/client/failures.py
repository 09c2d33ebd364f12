"""What failed attempts are called: statuses and broken connections, as Tokasaurus' errors."""

from __future__ import annotations

import email.utils
import errno
import ssl
import time
from collections.abc import Iterator, Mapping
from typing import Any

import httpx2 as httpx
import msgspec

from tokasaurus.client.address import API_KEY_VARIABLE, BASE_URL_VARIABLE
from tokasaurus.client.retrying import Failure, is_worth_retrying
from tokasaurus.errors import (
    AccessDenied,
    Conflict,
    EngineError,
    EngineNotReady,
    EngineOverloaded,
    FailedAnswer,
    NotFound,
    RequestError,
    RequestTooLong,
    SourceUnavailable,
    StorageFull,
    TimedOut,
    TokasaurusError,
    Unreachable,
)
from tokasaurus.open_files import num_files_allowed

__all__ = ["error_of", "failed_connection", "failed_time", "refusal"]

_LONGEST_WAIT_S = 3600.0

_OF_REQUESTS: dict[int, type[RequestError]] = {
    401: AccessDenied,
    403: AccessDenied,
    404: NotFound,
    409: Conflict,
}
_OF_ENGINES: dict[int, type[EngineError]] = {
    408: TimedOut,
    503: EngineNotReady,
    504: TimedOut,
    507: StorageFull,
}


def refusal(status: int, headers: Mapping[str, str], body: bytes) -> Failure:
    """What an answer that is no success means."""
    should_retry = headers.get("x-should-retry", "").lower()
    wait_s = _retry_after_s(headers.get("retry-after"))
    fields, text = _fields(body)
    error = error_of(status, fields, text, headers.get("x-request-id"), wait_s)
    return Failure(
        error,
        is_final=should_retry == "false" or not is_worth_retrying(status),
        retry_after_s=wait_s,
        maybe_done=status >= 500,
    )


def error_of(
    status: int,
    body: Mapping[str, Any],
    text: str = "",
    request_id: str | None = None,
    retry_after_s: float | None = None,
) -> TokasaurusError:
    """The error that a body ``{"error": {"message", "param", "code"}}`` describes.

    Args:
        status: of HTTP.
        body: the JSON of the answer; empty if it is none.
        text: the answer if it is no JSON.
        request_id: of the request.
        retry_after_s: when to try again, if the answer says so.
    """
    told = body.get("error")
    fields: Mapping[str, Any] = told if isinstance(told, Mapping) else {}
    code = fields.get("code")
    said = (
        fields.get("message")
        or (told if isinstance(told, str) else "")
        or " ".join(text.split())[:300]
    )
    message = f"{said or 'the answer does not say why'} (status {status})"
    if status == 401:
        message += f"; set {API_KEY_VARIABLE} or api_key to one of the engine's keys"
    if status >= 500 and request_id:
        message += f"; the engine's log has the request as {request_id}"
    error: TokasaurusError
    if status == 429:
        error = EngineOverloaded(message, round(retry_after_s or 0))
    elif status == 502 and code == "source_unavailable":
        error = SourceUnavailable(message)
    elif status >= 500 or status == 408:
        error = _OF_ENGINES.get(status, EngineError)(message)
    else:
        kind = _OF_REQUESTS.get(status, RequestError)
        if code == "context_length_exceeded":
            kind = RequestTooLong
        error = kind(message, fields.get("param"))
    error.answer = FailedAnswer(
        status, str(code) if code is not None else None, request_id, dict(body)
    )
    return error


def failed_connection(error: httpx.TransportError, url: str) -> Failure:
    """What a connection that was not made, or that broke, means."""
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            said = f"{url} is not trusted: {cause}; name the certificates to trust with ca_file"
            return Failure(Unreachable(said), is_final=True)
        if isinstance(cause, OSError) and cause.errno == errno.EMFILE:
            said = (
                f"no more connections to {url}: this process may have {num_files_allowed()} files"
                " open, and each connection is one; send fewer requests at once, or raise the"
                " limit (ulimit -n)"
            )
            return Failure(Unreachable(said), is_final=False)
    if isinstance(error, httpx.UnsupportedProtocol | httpx.LocalProtocolError):
        return Failure(Unreachable(f"{url} cannot be asked: {error}"), is_final=True)
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return Failure(
            Unreachable(
                f"nothing answers at {url} ({error or type(error).__name__}); start an engine with"
                f" `toka`, or name its address with base_url or {BASE_URL_VARIABLE}"
            ),
            is_final=False,
        )
    said = f"the connection to {url} broke before the answer was complete"
    return Failure(
        Unreachable(f"{said}: {error or type(error).__name__}"), is_final=False, maybe_done=True
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and what it came from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def failed_time(url: str, timeout_s: float | None) -> Failure:
    """What it means that there is no answer in time."""
    limit = "" if timeout_s is None else f" within timeout_s={timeout_s:g}"
    return Failure(TimedOut(f"no answer from {url}{limit}"), is_final=False, maybe_done=True)


def _fields(body: bytes) -> tuple[Mapping[str, Any], str]:
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}, body.decode(errors="replace")
    return (fields, "") if isinstance(fields, dict) else ({}, str(fields))


def _retry_after_s(value: str | None) -> float | None:
    """Seconds of a ``Retry-After``, which is a number of them or a date; at most an hour."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(0.0, seconds), _LONGEST_WAIT_S)
