"""The processes of one engine as its supervisor sees them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tokasaurus.launch.lifeline import Failed, Lifeline, Stop
from tokasaurus.launch.process import Process, how_it_ended
from tokasaurus.protocol.identity import WorkerIdentity
from tokasaurus.protocol.role import Role

__all__ = ["Member", "ReplicaProcesses"]


@dataclass(eq=False)
class Member:
    """One process, or the supervisor's own in the role of one.

    Attributes:
        role: of the process.
        lifeline: the supervisor's end.
        process: None for the supervisor's own.
        where: " on NAME" if it runs on another machine.
        is_ready: it has said so.
        is_dismissed: it was told to end at once, so its end is no news.
        worker: what it is, if it is a worker that is ready.
        failure: what it said before its end.
    """

    role: Role
    lifeline: Lifeline
    process: Process | None = None
    where: str = ""
    is_ready: bool = False
    is_dismissed: bool = False
    worker: WorkerIdentity | None = None
    failure: Failed | None = None

    def end_at_once(self) -> None:
        """Ends a process that has nothing to save, as managers and workers never have."""
        if self.process is None:
            self.lifeline.send(Stop())
        else:
            self.process.kill()

    def reap(self) -> None:
        """Waits until a process that has ended, or was killed, is gone."""
        if self.process is not None:
            self.process.wait()

    @property
    def how_it_ended(self) -> str:
        """Why the process ended, if it did not say it itself."""
        if self.process is None:
            return "it returned without being asked to"
        return how_it_ended(self.process) + self.where


@dataclass(eq=False)
class ReplicaProcesses:
    """The manager and the workers of a replica, which live and die together.

    A replica that is started again gets a directory of its own for its doors. So whatever was on
    the way to or from the former processes does not reach the new ones.

    Attributes:
        number: of the replica.
        directory: of its doors.
        num_starts: so far.
        members: those of the last start.
        started_at: when they were started, as ``time.monotonic`` counts.
    """

    number: int
    directory: str
    num_starts: int = 0
    members: list[Member] = field(default_factory=list)
    started_at: float = 0.0

    @property
    def is_ready(self) -> bool:
        """Whether all its processes are able to work."""
        return bool(self.members) and all(
            member.is_ready and not member.is_dismissed for member in self.members
        )

    @property
    def is_starting(self) -> bool:
        """Whether its processes are on the way to be ready."""
        return not self.is_ready and not any(member.is_dismissed for member in self.members)

    @property
    def is_started_again(self) -> bool:
        """Whether it is on the way to be ready, and not for the first time."""
        return self.num_starts > 1 and bool(self.members) and self.is_starting

    @property
    def workers(self) -> tuple[WorkerIdentity, ...]:
        """What its workers are, in the order of ranks."""
        return tuple(member.worker for member in self.members if member.worker is not None)

    def move(self, parent: str) -> None:
        """Takes a new directory below this one."""
        path = Path(parent, f"{self.number}.{self.num_starts}")
        path.mkdir(mode=0o700)
        self.directory = str(path)
