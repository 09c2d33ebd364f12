"""How ``toka restart`` reaches a keeper: a Unix socket in the keeper's private directory.

The directory can be found and entered only by its owner, so nobody else can restart an engine.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec

from tokasaurus.launch.keeping.notes import Control, Describe, Description
from tokasaurus.launch.leftovers import own_directories
from tokasaurus.launch.note_socket import NoteSocket, NotUnderstood

__all__ = ["ControlLink", "connect_to_keepers", "listen_for_control"]

_NAME = "control.sock"
_BACKLOG = 16
_ANSWER_S = 10.0

_decoder = msgspec.json.Decoder(Control)


class ControlLink(NoteSocket[Control]):
    """One end of the connection between ``toka restart`` and a keeper."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock, _decoder)


def listen_for_control(directory: str) -> socket.socket:
    """Opens the socket.

    Args:
        directory: of the keeper.
    """
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(Path(directory, _NAME)))
    listener.listen(_BACKLOG)
    return listener


def connect_to_keepers() -> Iterator[tuple[ControlLink, Description]]:
    """Connects to every keeper of this user that shares this process's temporary directory."""
    for directory in own_directories():
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(_ANSWER_S)
        link = ControlLink(sock)
        with contextlib.suppress(OSError, NotUnderstood):
            sock.connect(str(directory / _NAME))
            link.send(Describe())
            answer = link.receive_first()
            if isinstance(answer, Description):
                sock.settimeout(None)
                yield link, answer
                continue
        link.close()
