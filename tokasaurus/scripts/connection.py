"""The connection of a command to a running engine, and what to say when it fails.

Owns addresses and error messages. The engine speaks OpenAI's API, so the client is OpenAI's.
"""

from __future__ import annotations

import os

import openai

__all__ = ["connect", "explain"]

_CONNECT_S = 5.0
_API_KEY_VARIABLE = "TOKASAURUS_API_KEY"  # as the engine reads it
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def connect(host: str, port: int, retries: int = 0) -> openai.OpenAI:
    """A client of the engine at this address; nothing is sent yet.

    An answer may take as long as it takes; only the connection must come about in a few seconds.
    """
    name = _reachable(host)
    return openai.OpenAI(
        # Not OPENAI_API_KEY: OpenAI's own key is nobody else's business.
        api_key=os.environ.get(_API_KEY_VARIABLE, "").partition(",")[0].strip() or "none",
        base_url=f"http://{name}:{port}/v1",
        max_retries=retries,
        timeout=openai.Timeout(None, connect=_CONNECT_S),
        # No proxy stands between this machine and itself, whatever the environment says.
        http_client=openai.DefaultHttpxClient(trust_env=name not in _LOOPBACK),
    )


def _reachable(host: str) -> str:
    """An address to connect to: a server that listens on all addresses is on this one too."""
    if host in ("", "0.0.0.0"):
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def explain(error: openai.OpenAIError, client: openai.OpenAI) -> str:
    """The error in one line, with a remedy where there is one."""
    address = str(client.base_url).removesuffix("/").removesuffix("/v1")
    if isinstance(error, openai.APITimeoutError):
        return f"no answer from {address}"
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__
        if cause is None or "refused" in str(cause).lower():
            return (
                f"nothing listens at {address}; start an engine with `toka`, or name its port=..."
            )
        return f"the connection to {address} failed: {cause}"
    if isinstance(error, openai.AuthenticationError):
        return f"{_reason(error)}; set {_API_KEY_VARIABLE} to one of the engine's keys"
    if isinstance(error, openai.APIStatusError):
        return f"the engine answered with status {error.status_code}: {_reason(error)}"
    return f"{address}: {error}"


def _reason(error: openai.APIStatusError) -> str:
    body = error.body
    if isinstance(body, dict) and isinstance(body.get("message"), str):
        return str(body["message"])
    return error.message
