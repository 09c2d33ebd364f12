"""The processes of an engine: how they start, which of them live, and how all of them end."""

from __future__ import annotations

import os
import selectors
import socket

from tokasaurus.config.slices import EngineSlices
from tokasaurus.errors import LaunchError
from tokasaurus.launch.leftovers import own_directory, remove_directory, sweep
from tokasaurus.launch.lifeline import Assignment, Lifeline, Succession, ToProcess
from tokasaurus.launch.members import Member
from tokasaurus.launch.processes import Launcher, spawn
from tokasaurus.protocol.role import Role

__all__ = ["SERVER", "EngineMembers"]

SERVER = Role("server")


class EngineMembers:
    """Owns every process, socket and file of one engine.

    Args:
        slices: the resolved configuration.
        listener: the server's listening socket, which is closed at the end; None without HTTP.
        launcher: starts processes, and is closed at the end.
        succession: what the server must know of engines before and after this one.
        selector: has the lifelines of processes that live, each with its member.

    Attributes:
        launcher: as given.
        local_role: of this process.
        directory: private to the engine.
        living: the processes that have not ended, dismissed ones too.
    """

    def __init__(
        self,
        slices: EngineSlices,
        listener: socket.socket | None,
        launcher: Launcher,
        succession: Succession | None,
        selector: selectors.BaseSelector,
    ) -> None:
        self.launcher = launcher
        # Without HTTP the text core is in this process.
        self.local_role = SERVER if listener is None else Role(slices.local_proc_name)
        sweep()
        self.directory, self._owner = own_directory()
        self.living: set[Member] = set()
        self._all: list[Member] = []
        self._server: Member | None = None
        self._slices = slices
        self._listener = listener
        self._succession = succession
        self._selector = selector

    # --- starting ---------------------------------------------------------------------------------

    def assignment(self, role: Role, directory: str) -> Assignment:
        """What a process is told first.

        Args:
            role: of the process.
            directory: of its replica's doors, or of the engine.
        """
        doors = self.launcher.doors_of(role)
        if role != SERVER:
            return Assignment(role, directory, self._slices, doors=doors)
        # The server answers clients itself if it is the only server process.
        fd = None
        if self._listener is not None and self._slices.server_processes == 1:
            fd = self._listener.fileno()
        return Assignment(role, directory, self._slices, fd, self._succession, doors)

    def launch(self, role: Role, directory: str) -> Member:
        """Starts a process where the launcher has a place for it.

        Args:
            role: of the process.
            directory: of its replica's doors.
        """
        process, lifeline = self.launcher.launch(self.assignment(role, directory))
        return self.adopt(Member(role, lifeline, process, self.launcher.where(role)))

    def launch_beside(self, role: Role) -> Member:
        """Starts an HTTP process, which is always beside the server."""
        assert self._listener is not None
        fd = self._listener.fileno()
        assignment = Assignment(role, self.directory, self._slices, fd, self._succession)
        process, lifeline = spawn(assignment)
        return self.adopt(Member(role, lifeline, process))

    def adopt_local(self, lifeline: Lifeline) -> Member:
        """This process has a role, too.

        Args:
            lifeline: the supervisor's end.
        """
        return self.adopt(Member(self.local_role, lifeline))

    def adopt(self, member: Member) -> Member:
        """Watches a process that has started."""
        self.living.add(member)
        self._all.append(member)
        if member.role == SERVER:
            self._server = member
        self._selector.register(member.lifeline, selectors.EVENT_READ, member)
        return member

    # --- those that live --------------------------------------------------------------------------

    @property
    def server_lives(self) -> bool:
        """Whether the server has not ended."""
        return self._server in self.living

    @property
    def others(self) -> set[Member]:
        """Those that live, without the server."""
        return {member for member in self.living if member is not self._server}

    def tell_server(self, note: ToProcess) -> None:
        """Sends a note to the server, if there is one."""
        if self._server is not None:
            self._server.lifeline.send(note)

    def pid(self, role: Role) -> int:
        """The process id of a role that lives in a process of its own on this machine.

        Raises:
            LaunchError: there is none.
        """
        for member in list(self.living):
            process = member.process
            if member.role == role and process is not None and process.pid is not None:
                return process.pid
        raise LaunchError(f"the {role} has no process on this machine")

    def worker_ids(self) -> list[int]:
        """The process ids of the workers on this machine."""
        workers = [each for each in self.living if each.role.kind == "worker"]
        pids = [os.getpid() if each.process is None else each.process.pid for each in workers]
        return [pid for pid in pids if pid is not None]

    # --- the end ----------------------------------------------------------------------------------

    def note_end(self, member: Member) -> None:
        """The lifeline of a process has ended."""
        self._selector.unregister(member.lifeline)
        self.living.discard(member)
        member.lifeline.close()

    def end_all(self) -> None:
        """Kills all processes but this one, and deletes what the engine has."""
        processes = [member.process for member in self._all if member.process is not None]
        for process in processes:
            process.kill()
        # An outpost that is busy obeys late; its processes count as ended once it is dismissed.
        self.launcher.close()
        for process in processes:
            process.wait()
        if self._listener is not None:
            self._listener.close()
        remove_directory(self.directory, self._owner)
