"""The connection of a command to a running engine, and the error messages when it fails.

The engine speaks OpenAI's API, so the client is OpenAI's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import openai

from tokasaurus.client.address import API_KEY_VARIABLE, first_key
from tokasaurus.client.certificates import trusted
from tokasaurus.config.schema import flag

__all__ = ["Connection", "connect", "explain"]

_CONNECT_S = 5.0
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True, kw_only=True)
class Connection:
    """The flags of a command that say where the engine is."""

    port: int = flag(10210, minimum=1, maximum=65535, help="The engine's port.")
    host: str = flag("127.0.0.1", help="The engine's address; 0.0.0.0 means this machine.")
    https: bool = flag(
        False, help="The engine serves HTTPS, since it has an ssl_certfile; implied by ca_file."
    )
    ca_file: str | None = flag(
        None,
        help="A PEM file with the certificates to trust: the engine's own, or that of its issuer.",
        adapts="those that the system trusts",
    )


def connect(to: Connection, retries: int = 0) -> openai.OpenAI:
    """Makes a client of the engine at this address; nothing is sent yet.

    An answer may take any time; only the connection must be made within a few seconds.

    Raises:
        ConfigError: the certificates cannot be read.
    """
    name = _reachable(to.host)
    is_https = to.https or to.ca_file is not None
    url = f"{'https' if is_https else 'http'}://{name}:{to.port}/v1"
    return openai.OpenAI(
        # Not OPENAI_API_KEY: a key for OpenAI must not be sent to others.
        api_key=first_key(os.environ.get(API_KEY_VARIABLE, "")) or "none",
        base_url=url,
        max_retries=retries,
        timeout=openai.Timeout(None, connect=_CONNECT_S),
        # A connection to this machine needs no proxy, whatever the environment says.
        http_client=openai.DefaultHttpxClient(
            trust_env=name not in _LOOPBACK, verify=trusted(url, to.ca_file)
        ),
    )


def _reachable(host: str) -> str:
    """An address to connect to; a server on all addresses is on the loopback address too."""
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
        said = str(cause)
        if cause is None or "refused" in said.lower():
            return f"nothing listens at {address}; start an engine with `toka`, or set its port=..."
        if "CERTIFICATE_VERIFY_FAILED" in said:
            return (
                f"{address} is not trusted: {said}; name the certificate to trust with ca_file=..."
            )
        if "WRONG_VERSION_NUMBER" in said or "RECORD_LAYER_FAILURE" in said:
            return f"{address} does not answer in HTTPS; leave out https and ca_file"
        # A server that expects HTTPS hangs up, with or without a reset.
        if address.startswith("http:") and ("disconnected" in said or "reset" in said):
            return f"{address} does not answer in HTTP ({said}); if it serves HTTPS, set https=T"
        return f"the connection to {address} failed: {cause}"
    if isinstance(error, openai.AuthenticationError):
        return f"{_reason(error)}; set {API_KEY_VARIABLE} to one of the engine's keys"
    if isinstance(error, openai.APIStatusError):
        return f"the engine answered with status {error.status_code}: {_reason(error)}"
    return f"{address}: {error}"


def _reason(error: openai.APIStatusError) -> str:
    body = error.body
    if isinstance(body, dict) and isinstance(body.get("message"), str):
        return str(body["message"])
    return error.message
