"""Which network interface the ranks of a replica talk over."""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import MutableMapping

__all__ = ["interface_of", "use_interface_of"]

_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_SIOCGIFADDR = 0x8915


def use_interface_of(host: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets torch.distributed use the interface of an address, unless the user chose one.

    By itself gloo takes the one that the machine's name resolves to, which others may not reach.
    """
    name = interface_of(host)
    for variable in _VARIABLES:
        if name is not None and variable not in environment:
            environment[variable] = name


def interface_of(host: str) -> str | None:
    """The name of the interface with an IPv4 address of this machine; None if it is not found."""
    if not sys.platform.startswith("linux") or ":" in host:
        return None
    import fcntl

    wanted = socket.inet_aton(host)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(sock, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has no such address
                continue
            if found[20:24] == wanted:
                return name
    return None
