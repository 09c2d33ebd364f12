"""Answers over HTTP: JSON with a status and headers, and every error in the shape of ``errors``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from tokasaurus.errors import EngineNotReady, EngineOverloaded, StorageFull, TokasaurusError
from tokasaurus.server.errors import (
    CommandTimeout,
    TimeIsUp,
    Unauthorized,
    described,
    error_body,
    error_status,
)

__all__ = ["error_answer", "install_error_handlers", "json_answer"]

_RETRY_AFTER_S = 5


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
    elif isinstance(error, (CommandTimeout, TimeIsUp, StorageFull)):
        # Otherwise OpenAI's clients send the same request again.
        headers["X-Should-Retry"] = "false"
    elif isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return json_answer(error_body(error), error_status(error), headers)


def install_error_handlers(app: FastAPI) -> None:
    """Makes an application answer every error in OpenAI's shape."""

    def tokasaurus_error(request: Request, error: Exception) -> Response:
        return error_answer(error)

    def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = f"{request.method} {request.url.path}"
        message = {404: f"no such route: {path}", 405: f"method not allowed: {path}"}.get(
            error.status_code, str(error.detail)
        )
        body = described(message, "invalid_request_error")
        return json_answer(body, error.status_code, error.headers)

    def unexpected_error(request: Request, error: Exception) -> Response:
        # Starlette raises the error again after this answer, and uvicorn logs it.
        return json_answer(error_body(error), 500)

    app.add_exception_handler(TokasaurusError, tokasaurus_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unexpected_error)
