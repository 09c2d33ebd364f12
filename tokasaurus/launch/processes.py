"""The processes of an engine as its supervisor sees them, and how those of this machine start."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

from tokasaurus.errors import LaunchError
from tokasaurus.launch.lifeline import Assignment, Lifeline
from tokasaurus.launch.process import Process
from tokasaurus.protocol.doors import Door
from tokasaurus.protocol.role import Role

__all__ = ["Launcher", "LocalLauncher", "spawn"]


class Launcher(Protocol):
    """Decides where the processes of an engine run, and starts them."""

    def prepare(self, roles: Sequence[Role]) -> None:
        """Finds places and doors for these processes, which are about to be launched.

        Raises:
            LaunchError: there are none.
        """

    def prepare_again(
        self, roles: Sequence[Role], done: Callable[[LaunchError | None], None]
    ) -> None:
        """The same for a replica whose processes have ended, which may take long.

        Args:
            roles: of the replica.
            done: is called in any thread, with what ``prepare`` would raise.
        """

    def doors_of(self, role: Role) -> dict[str, Door]:
        """The doors that a process opens or enters, as ``Assignment.doors``."""

    def server_doors_of(self, replica: int) -> dict[str, Door]:
        """Those that the server opens or enters for a replica."""

    def launch(self, assignment: Assignment) -> tuple[Process, Lifeline]:
        """Starts a process; returns it, with the supervisor's end of its lifeline."""

    def where(self, role: Role) -> str:
        """Where a process runs, for messages: "" for this machine, otherwise " on NAME"."""

    def close(self) -> None:
        """Gives up what belongs to no process."""


class LocalLauncher:
    """Starts every process on this machine."""

    def prepare(self, roles: Sequence[Role]) -> None:
        pass

    def prepare_again(
        self, roles: Sequence[Role], done: Callable[[LaunchError | None], None]
    ) -> None:
        done(None)

    def doors_of(self, role: Role) -> dict[str, Door]:
        return {}

    def server_doors_of(self, replica: int) -> dict[str, Door]:
        return {}

    def launch(self, assignment: Assignment) -> tuple[Process, Lifeline]:
        return spawn(assignment)

    def where(self, role: Role) -> str:
        return ""

    def close(self) -> None:
        pass


def spawn(assignment: Assignment) -> tuple[subprocess.Popen[bytes], Lifeline]:
    """Starts a process on this machine; it inherits the sockets that its assignment names."""
    ours, theirs = Lifeline.pair()
    sockets = [assignment.listener_fd, *(door.listener_fd for door in assignment.doors.values())]
    process = subprocess.Popen(
        [sys.executable, "-m", "tokasaurus.launch.child", str(theirs.fileno())],
        pass_fds=[theirs.fileno(), *(each for each in sockets if each is not None)],
        stdin=subprocess.DEVNULL,
    )
    theirs.close()
    ours.send(assignment)
    return process, ours
