"""The replicas of an engine as its supervisor sees them.

When a process of a replica ends, the rest of this replica ends, and the replica is started again;
meanwhile the server goes on with the others. ``Restarts`` says when that has failed too often.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from functools import partial

from tokasaurus.config.slices import EngineSlices
from tokasaurus.errors import LaunchError
from tokasaurus.launch.engine_members import SERVER, EngineMembers
from tokasaurus.launch.lifeline import Failed, Lost, Ready, Restored, Start
from tokasaurus.launch.members import Member, ReplicaProcesses
from tokasaurus.launch.restarts import Restarts
from tokasaurus.launch.roles import roles_of
from tokasaurus.protocol.role import Role

__all__ = ["ReplicaMembers"]

log = logging.getLogger(__name__)

# A replica that is started again may take this many times as long as the longest first start, which
# loaded the same model on the same machine. It may share the machine with work now.
_START_FACTOR = 5.0
_MIN_START_S = 60.0


class ReplicaMembers:
    """Starts replicas, and decides what becomes of one that has lost a process.

    Args:
        slices: the resolved configuration.
        members: of the engine.
        wake: makes the watching thread call ``launch_placed``; called in any thread.
    """

    def __init__(
        self, slices: EngineSlices, members: EngineMembers, wake: Callable[[], object]
    ) -> None:
        self._slices = slices
        self._members = members
        self._wake = wake
        self._replicas = {  # that go on, or will after a start
            number: ReplicaProcesses(number, members.directory)
            for number in range(len(slices.replicas))
        }
        self._restarts = Restarts(slices.replica_restarts)
        self._first_start_s = 0.0  # the longest, of any replica
        self._has_begun = False  # the server was told to start
        # Replicas that have places for another start, and why not if they have none.
        self._placed: queue.SimpleQueue[tuple[int, LaunchError | None]] = queue.SimpleQueue()

    # --- starting ---------------------------------------------------------------------------------

    def adopt(self, member: Member) -> None:
        """A manager or a worker has started."""
        replica = self._replicas[member.role.replica]
        replica.members.append(member)

    def launch(self, role: Role) -> None:
        """Starts a manager or a worker."""
        self.adopt(self._members.launch(role, self._replicas[role.replica].directory))

    def note_started(self) -> None:
        """All processes have been started for the first time."""
        for replica in self._replicas.values():
            replica.num_starts, replica.started_at = 1, time.monotonic()

    def note_ready(self, member: Member, note: Ready) -> None:
        """A manager or a worker is ready."""
        replica = self._replicas[member.role.replica]
        if member.role.kind == "worker":
            member.worker = note.worker
            for other in replica.members:
                if other.role.kind == "manager":
                    other.lifeline.send(note)
        if not replica.is_ready:
            return
        self._restarts.ready(replica.number)
        if replica.num_starts == 1:
            took_s = time.monotonic() - replica.started_at
            self._first_start_s = max(self._first_start_s, took_s)
        if self._has_begun:
            self._tell_restored(replica)

    def is_ready(self, number: int) -> bool:
        """Whether a replica is there, and all its processes are able to work."""
        replica = self._replicas.get(number)
        return replica is not None and replica.is_ready

    @property
    def can_begin(self) -> bool:
        """Whether each replica is ready or has ended, and one is ready."""
        replicas = self._replicas.values()
        is_first = any(each.num_starts == 1 and each.is_starting for each in replicas)
        return not is_first and any(each.is_ready for each in replicas)

    def begin(self) -> None:
        """Tells the server to start with those that are ready."""
        self._has_begun = True
        ready = [replica for replica in self._replicas.values() if replica.is_ready]
        workers = {each.number: each.workers for each in ready if each.num_starts == 1}
        self._members.tell_server(Start(workers))
        for replica in ready:
            if replica.num_starts > 1:
                self._tell_restored(replica)

    def _tell_restored(self, replica: ReplicaProcesses) -> None:
        log.warning("replica %d is ready again", replica.number)
        doors = self._members.launcher.server_doors_of(replica.number)
        self._members.tell_server(
            Restored(replica.number, replica.directory, replica.workers, doors)
        )

    # --- starting again ---------------------------------------------------------------------------

    @property
    def start_deadline(self) -> float | None:
        """When the next replica that is started again must be ready; None if none is."""
        limit_s = self._start_limit_s
        if limit_s is None:
            return None
        starting = [each for each in self._replicas.values() if each.is_started_again]
        return min((each.started_at + limit_s for each in starting), default=None)

    @property
    def _start_limit_s(self) -> float | None:
        """None as long as no replica has shown how long a start takes."""
        if not self._first_start_s:
            return None
        return max(_MIN_START_S, _START_FACTOR * self._first_start_s)

    def slow_starts(self) -> list[tuple[Role, Failed]]:
        """Replicas whose second or later start takes too long: a process of them hangs."""
        now, limit_s = time.monotonic(), self._start_limit_s
        found: list[tuple[Role, Failed]] = []
        for replica in self._replicas.values():
            if limit_s is None or not replica.is_started_again:
                continue
            if now >= replica.started_at + limit_s:
                late = [member for member in replica.members if not member.is_ready]
                reason = f"the {late[0].role} was not ready {limit_s:.0f} s after its start"
                found.append((late[0].role, Failed(reason, "")))
        return found

    def start_again(self, number: int) -> None:
        """Finds places for a replica, once its former processes are gone and its devices free."""
        replica = self._replicas.get(number)
        if replica is None or not self._members.server_lives:
            return
        living = self._members.living
        if any(each in living or not each.is_dismissed for each in replica.members):
            return
        replica.move(self._members.directory)
        replica.num_starts += 1
        roles = [member.role for member in replica.members]
        replica.members = []
        self._members.launcher.prepare_again(roles, partial(self._note_placed, number))

    def _note_placed(self, number: int, problem: LaunchError | None) -> None:
        """Tells the watching thread; in any thread."""
        self._placed.put((number, problem))
        self._wake()

    def launch_placed(self) -> list[tuple[Role, Failed]]:
        """Starts replicas that have places again.

        Returns:
            Those that have found none: a role of each, and why.
        """
        failed: list[tuple[Role, Failed]] = []
        while not self._placed.empty():
            number, problem = self._placed.get()
            replica = self._replicas.get(number)
            if replica is None:
                continue
            roles = [
                role for role in roles_of(self._slices) if role != SERVER and role.replica == number
            ]
            if problem is not None:
                failure = Failed(f"replica {number}: {problem}", "", is_final=True)
                failed.append((roles[0], failure))
                continue
            replica.started_at = time.monotonic()
            for role in roles:
                self.launch(role)
        return failed

    # --- the end of a replica ---------------------------------------------------------------------

    def lose(self, number: int, failure: Failed, *, is_stopping: bool) -> bool:
        """Ends a replica that has lost a process, and starts it again if that may help.

        Args:
            number: of the replica.
            failure: what happened to the process; names it.
            is_stopping: the engine ends anyway.

        Returns:
            Whether the engine goes on.
        """
        replica = self._replicas.get(number)
        if replica is None:
            return True
        why_not = self._why_not_again(replica, failure, is_stopping=is_stopping)
        is_last = len(self._replicas) == 1 and why_not is not None
        if is_last or not self._members.server_lives:
            return False
        if why_not is not None:
            del self._replicas[replica.number]
        log.error(
            "%s; %s, %s",
            failure.summary,
            self._count_others(replica),
            "and it is started again" if why_not is None else f"and it is not, since {why_not}",
            extra={"traceback": failure.traceback},
        )
        for member in replica.members:
            member.is_dismissed = True
            if member in self._members.living:
                member.end_at_once()
        self._members.tell_server(
            Lost(replica.number, failure.summary, starts_again=why_not is None)
        )
        self.start_again(replica.number)
        return True

    def _why_not_again(
        self, replica: ReplicaProcesses, failure: Failed, *, is_stopping: bool
    ) -> str | None:
        """Why a replica is not started again; None if it is."""
        if len(self._slices.replicas) == 1:
            return "it is the only one"
        if is_stopping:
            return "the engine is shutting down"
        if failure.is_final:
            return "it would end in the same way"
        if any(member.process is None for member in replica.members):
            return f"its {self._members.local_role} runs in the foreground"
        return self._restarts.ended(replica.number)

    def _count_others(self, replica: ReplicaProcesses) -> str:
        num_ready = sum(each.is_ready for each in self._replicas.values() if each is not replica)
        return "1 replica goes on" if num_ready == 1 else f"{num_ready} replicas go on"
