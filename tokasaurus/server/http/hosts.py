"""Which names a client may call the engine by, in ``Host``."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence

from tokasaurus.server.errors import Misdirected

__all__ = ["Hosts"]

# A name or an IPv4 address, or an IPv6 address in brackets; then perhaps a port.
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s:/?#@\[\]]+))(?::[0-9]*)?", re.ASCII)
_LOOPBACK_NAMES = frozenset(
    {
        "localhost",
        "localhost.localdomain",
        "localhost4",
        "localhost6",
        "ip6-localhost",
        "ip6-loopback",
    }
)


class Hosts:
    """The names of loopback, the name of the engine's own host, and some more.

    Args:
        host: that the engine listens on.
        allowed: more names. ``*.example.org`` stands for all names below ``example.org``, and ``*``
            for every name.
    """

    def __init__(self, host: str, allowed: Sequence[str]) -> None:
        self._names = {_plain(each) for each in (host, *allowed)}
        self._endings = tuple(_plain(each[1:]) for each in allowed if each.startswith("*."))

    def check(self, value: str) -> None:
        """Raises Misdirected if a request with this ``Host`` is for something else."""
        if "*" in self._names:
            return
        match = _HOST.fullmatch(value.lower())
        if match is not None:
            name = _plain(match[1] or match[2])
            if name in self._names or name.endswith(self._endings) or _is_loopback_name(name):
                return
        raise Misdirected(
            f"this engine does not answer to the name {value!r} in Host; if that is its name, start"
            " it with allowed_hosts=NAME, or with an API key"
        )


def _plain(name: str) -> str:
    return name.lower().strip("[]").removesuffix(".")


def _is_loopback_name(name: str) -> bool:
    """Whether only this machine goes by this name; 0.0.0.0 and :: count as the machine itself."""
    if name in _LOOPBACK_NAMES or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        try:  # forms such as 127.1, which curl leaves as they are
            address = ipaddress.ip_address(socket.inet_aton(name))
        except (OSError, ValueError):
            return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_loopback or mapped.is_unspecified)
