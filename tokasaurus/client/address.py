"""Where an engine is, and with which key: arguments first, then the environment."""

from __future__ import annotations

import os
import urllib.request
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tokasaurus.errors import ConfigError

__all__ = ["API_KEY_VARIABLE", "BASE_URL_VARIABLE", "Address", "first_key"]

BASE_URL_VARIABLE = "TOKASAURUS_BASE_URL"
API_KEY_VARIABLE = "TOKASAURUS_API_KEY"  # the engine reads it, too
_DEFAULT = "http://127.0.0.1:10210"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Address:
    """The address of an engine.

    Attributes:
        url: without ``/v1`` and without a slash at its end.
        api_key: None if there is none.
    """

    url: str
    api_key: str | None = field(repr=False)

    @classmethod
    def of(cls, base_url: str | None, api_key: str | None) -> Address:
        """The address that a program names; None leaves it to the environment.

        Args:
            base_url: with or without ``/v1``; default ``TOKASAURUS_BASE_URL``, or the port of an
                engine on this machine.
            api_key: default the first key of ``TOKASAURUS_API_KEY``.

        Raises:
            ConfigError: the URL is none.
        """
        url = (base_url or os.environ.get(BASE_URL_VARIABLE) or _DEFAULT).strip()
        if "://" not in url:
            url = f"http://{url}"
        url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query
            _ = parts.port
        except ValueError:
            usable = False
        if not usable:
            raise ConfigError(
                f"base_url={url!r} is no address of an engine; it has the form"
                f" {_DEFAULT} (or set {BASE_URL_VARIABLE})"
            )
        if api_key is None:
            api_key = first_key(os.environ.get(API_KEY_VARIABLE, ""))
        return cls(url, api_key or None)

    @property
    def proxy(self) -> str | None:
        """The proxy that the environment names for this address; none on this machine."""
        parts = urlsplit(self.url)
        host = parts.hostname or ""
        if host in _LOOPBACK or urllib.request.proxy_bypass(host):
            return None
        return urllib.request.getproxies().get(parts.scheme)


def first_key(keys: str) -> str:
    """The first of keys with commas between them, without what the engine is told of it."""
    return keys.partition(",")[0].strip().partition(" ")[0]
