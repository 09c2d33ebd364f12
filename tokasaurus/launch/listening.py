"""The listening socket of an engine."""

from __future__ import annotations

import errno
import socket

from tokasaurus.errors import ConfigError

__all__ = ["listen"]

_BACKLOG = 2048  # connections that wait while the server is busy


def listen(host: str, port: int) -> socket.socket:
    """Takes the port before anything slow begins.

    Raises:
        ConfigError: the address is not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} is in use on {host}; choose another with port="
            ) from None
        # socket.create_server adds the address to strerror.
        reason = (error.strerror or str(error)).partition(" (while")[0]
        raise ConfigError(f"cannot listen on host={host} port={port}: {reason}") from None
