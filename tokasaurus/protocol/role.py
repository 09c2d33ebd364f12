"""Names for the processes of an engine, and for the doors that they open."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

__all__ = ["Kind", "Role"]

Kind: TypeAlias = Literal["server", "http", "manager", "worker"]


class Role(msgspec.Struct, frozen=True, order=True):
    """One process of an engine.

    An engine has one server, and for each replica a manager and one or more workers. The server
    opens a door for each replica, which is named like a role too: ``Role("server", replica)``.
    With ``server_processes`` over 1 it also has HTTP processes, ``Role("http", number)`` with
    numbers from 1 on, and the door of the server for their messages is ``Role("http")``.

    The first of each kind has the kind as its name; others add their numbers::

        server   manager   worker   worker-0-1   manager-1   worker-1-0   worker-1-1
    """

    kind: Kind
    replica: int = 0
    rank: int = 0  # of a worker, within its replica

    def __str__(self) -> str:
        if self.replica == self.rank == 0:
            return self.kind
        numbers = (self.replica, self.rank) if self.kind == "worker" else (self.replica,)
        return "-".join(map(str, (self.kind, *numbers)))
