"""Which certificates of servers are trusted."""

from __future__ import annotations

import ssl

from tokasaurus.errors import ConfigError

__all__ = ["trusted"]


def trusted(url: str, ca_file: str | None) -> ssl.SSLContext:
    """What httpx takes as ``verify``: one context, which all connections to an address share.

    Without one httpx reads the certificates of the system for each pool of connections, even if the
    address is one of plain HTTP, which takes 20 ms.

    Args:
        url: of the server; only one with https needs certificates.
        ca_file: PEM file of the certificates to trust; None trusts those of the system.

    Raises:
        ConfigError: the file cannot be read as certificates.
    """
    if ca_file is None and not url.startswith("https:"):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nothing, and is not used
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # includes ssl.SSLError
        raise ConfigError(f"ca_file={ca_file!r} cannot be read as certificates: {error}") from None
