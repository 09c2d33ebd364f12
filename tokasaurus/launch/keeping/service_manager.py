"""What systemd is told of the keeper's state, by the protocol of sd_notify(3).

It is a datagram to the socket that ``NOTIFY_SOCKET`` names, if the service is of the type
``notify`` or ``notify-reload``. Elsewhere nothing is told.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import MutableMapping

__all__ = ["ServiceManager"]

_VARIABLE = "NOTIFY_SOCKET"


class ServiceManager:
    """Whoever started this process, as far as it wants to know.

    Args:
        environment: the variable is taken out of it, since engines must not answer for the keeper.
    """

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        address = environment.pop(_VARIABLE, "")
        # Names of Linux's abstract namespace are written with an @.
        self._address = "\0" + address[1:] if address.startswith("@") else address

    def ready(self) -> None:
        """The engine serves, for the first time or after a restart."""
        self._tell("READY=1")

    def restarting(self) -> None:
        """A new engine is started beside the old one."""
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={now_us}")

    def stopping(self) -> None:
        """The engine drains."""
        self._tell("STOPPING=1")

    def _tell(self, text: str) -> None:
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
            told.sendto(text.encode(), self._address)
