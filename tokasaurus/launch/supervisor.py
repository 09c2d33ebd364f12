"""The supervisor: starts the processes of an engine, watches them, and ends them.

::

    engine ─┬─ server   (in the engine's own process, unless local_proc_name says otherwise)
            ├─ manager
            ├─ worker
            ├─ managers and workers of further replicas
            └─ HTTP processes, if there are several server processes

One thread watches the lifelines; the foreground role has the main thread. A replica that loses a
process is started again, unless it is the only one: then the engine ends. An HTTP process that ends
is started again as well.

Whatever ends the engine (a signal, an exception, the end of the last replica), it ends in the same
order: first the server, so that every client gets an answer or an error, then the other processes,
then the private directory.

Below a keeper, the keeper handles signals, and notes of it come in their place. Then the engine can
also step down: another serves already, and this one ends with its last request.

A program with an engine of several processes is the server itself (``start`` and ``close``). Then
there is no foreground role, and signals are the program's business.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from tokasaurus.config.slices import EngineSlices
from tokasaurus.launch.engine_members import SERVER, EngineMembers
from tokasaurus.launch.foreground import Foreground
from tokasaurus.launch.http_members import HTTPMembers
from tokasaurus.launch.keeping.engine_end import KeeperEnd
from tokasaurus.launch.keeping.notes import AskStanding, CannotServe, End, Serves, StepDown, Watches
from tokasaurus.launch.lifeline import (
    AskRetire,
    Assignment,
    Dead,
    Done,
    Failed,
    FromProcess,
    Joined,
    Left,
    Lifeline,
    MayRetire,
    Ready,
    Replace,
    Retire,
    Serving,
    Stop,
    ToProcess,
)
from tokasaurus.launch.members import Member
from tokasaurus.launch.processes import Launcher, LocalLauncher
from tokasaurus.launch.replica_members import ReplicaMembers
from tokasaurus.launch.roles import Front, roles_of
from tokasaurus.launch.timeline import begin_file
from tokasaurus.protocol.role import Role

__all__ = ["Supervisor"]

log = logging.getLogger(__name__)

# Time for the server to answer its clients after a death, and for the others to exit.
_FLUSH_S = 5.0

# Why the watching thread wakes up.
_STOP = b"s"
_PLACED = b"p"
_USR2 = b"u"


class Supervisor:
    """Watches the processes of one engine, and decides when it ends.

    Args:
        slices: the resolved configuration.
        listener: the server's listening socket, which the supervisor closes; None without HTTP.
        front: what runs in the foreground in the server's place; None serves.
        launcher: starts the other processes, and is closed at the end; None starts them here.
        keeper: has started this engine; None if nothing has.
    """

    def __init__(
        self,
        slices: EngineSlices,
        listener: socket.socket | None,
        front: Front | None = None,
        launcher: Launcher | None = None,
        keeper: KeeperEnd | None = None,
    ) -> None:
        self._slices = slices
        self._keeper = keeper
        self._front = front
        self._selector = selectors.DefaultSelector()
        self._wake_watcher, self._wake_sender = socket.socketpair()
        succession = None if keeper is None else keeper.succession
        members = self._members = EngineMembers(
            slices, listener, launcher or LocalLauncher(), succession, self._selector
        )
        self._replicas = ReplicaMembers(
            slices, members, wake=lambda: self._wake_sender.send(_PLACED)
        )
        has_http = listener is not None and slices.server_processes > 1
        self._http = HTTPMembers(
            slices.server_processes if has_http else 0, slices.replica_restarts
        )
        self._has_begun = False  # the server was told to start
        # Why the engine ends; None if it was asked to.
        self._failure: Failed | None = None
        self._failed_role = SERVER
        self._stopping = False
        self._is_retiring = False  # it is stopping, since another engine serves
        self._owns_process = False  # this is toka, which ends with the engine
        self._watcher = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._deadline: float | None = None

    def run(self) -> int:
        """Runs the engine until a signal or a death ends it.

        Returns:
            The exit status: 0 after a drain, 1 after a death, 130 if a second signal cut the drain.
        """
        self._owns_process = True
        assignment, lifeline = self._spawn_all()
        foreground = Foreground(self._on_signal)
        try:
            with foreground.handling_signals():
                self._watcher.start()
                foreground.run(assignment, lifeline, self._front)
                self._watcher.join()
        finally:
            self._members.end_all()
        if self._failure is not None:
            self._report_failure(self._failure)
            return 1
        return 0

    def start(self) -> tuple[Assignment, Lifeline]:
        """Starts the other processes of an engine whose text core the caller is.

        Returns:
            The text core's assignment, and its end of a lifeline.
        """
        started = self._spawn_all()
        self._watcher.start()
        return started

    def close(self, lifeline: Lifeline) -> None:
        """Ends what ``start`` has started.

        Args:
            lifeline: the text core's end, which is closed.
        """
        lifeline.send(Done())
        lifeline.close()
        self._watcher.join()
        self._members.end_all()

    def pid(self, role: Role) -> int:
        """The process id of a role that lives in a process of its own on this machine.

        Raises:
            LaunchError: there is none.
        """
        return self._members.pid(role)

    @property
    def failure(self) -> Failed | None:
        """Why the engine has ended by itself; None if it has not."""
        return self._failure

    # --- starting ---------------------------------------------------------------------------------

    def _spawn_all(self) -> tuple[Assignment, Lifeline]:
        """Starts all processes, and returns the assignment and the lifeline of the local role."""
        if self._slices.profile_path is not None:
            begin_file(Path(self._slices.profile_path).expanduser())
        self._selector.register(self._wake_watcher, selectors.EVENT_READ, None)
        if self._keeper is not None:
            self._selector.register(self._keeper, selectors.EVENT_READ, self._keeper)
            self._keeper.send(Watches(self._slices.server.restart_timeout_s))
        ours, theirs = Lifeline.pair()
        try:
            self._launch_all(ours)
        except BaseException:  # none of those that have started is left behind
            self._members.end_all()
            raise
        members = self._members
        return members.assignment(members.local_role, members.directory), theirs

    def _launch_all(self, local_lifeline: Lifeline) -> None:
        members, roles = self._members, roles_of(self._slices)
        members.launcher.prepare(roles)
        for role in roles:
            if role == members.local_role:
                member = members.adopt_local(local_lifeline)
                if role != SERVER:
                    self._replicas.adopt(member)
            elif role == SERVER:
                members.launch(role, members.directory)
            else:
                self._replicas.launch(role)
        for role in self._http.first_roles():
            self._launch_http(role)
        self._replicas.note_started()

    def _launch_http(self, role: Role) -> None:
        self._http.living.add(self._members.launch_beside(role))
        self._members.tell_server(Joined(role.replica))

    # --- signals, in the main thread --------------------------------------------------------------

    def _on_signal(self, number: int) -> None:
        if self._keeper is None:  # otherwise it says what to do
            self._wake_sender.send(_USR2 if number == signal.SIGUSR2 else _STOP)

    # --- watching, in a thread of its own ---------------------------------------------------------

    def _watch(self) -> None:
        with self._selector as selector:
            while self._members.living:
                due = (self._deadline, self._replicas.start_deadline)
                wait = min((each for each in due if each is not None), default=None)
                events = selector.select(
                    None if wait is None else max(0.0, wait - time.monotonic())
                )
                deadline = self._deadline
                if deadline is not None and not events and time.monotonic() >= deadline:
                    self._kill_all()
                    return
                for role, failure in self._replicas.slow_starts():
                    self._lose(role, failure)
                for key, _ in events:
                    if key.data is None:
                        self._on_woken()
                    elif isinstance(key.data, KeeperEnd):
                        self._on_keeper(key.data)
                    else:
                        self._on_readable(key.data)

    def _on_woken(self) -> None:
        reasons = self._wake_watcher.recv(1024)
        if not self._stopping:
            for role, failure in self._replicas.launch_placed():
                self._lose(role, failure)
        if _STOP in reasons:
            self._on_stop_requested()
        elif _USR2 in reasons:
            log.warning("SIGUSR2 restarts only what the command toka has started on one machine")

    def _on_keeper(self, keeper: KeeperEnd) -> None:
        notes = keeper.receive()
        if notes is None:
            log.error("toka is gone; stopping at once")
            self._selector.unregister(keeper)
            self._stopping = True
            self._kill_all()
            return
        for note in notes:
            if isinstance(note, End):
                self._on_stop_requested()
            elif isinstance(note, AskStanding):
                self._members.tell_server(AskRetire())
            elif isinstance(note, StepDown) and not self._stopping:
                self._is_retiring = True
                self._stop_server(Retire(note.timeout_s, note.successor), note.timeout_s)

    def _on_stop_requested(self) -> None:
        if self._stopping and not self._is_retiring:
            log.warning("stopping at once")
            self._kill_all()
            return
        self._is_retiring = False
        if self._has_begun:
            log.info("draining (a second signal stops at once)")
        else:
            log.info("stopping before it was ready")
            self._end_others_at_once()
        self._stop_server(Stop(), self._slices.server.shutdown_timeout_s)

    def _on_readable(self, member: Member) -> None:
        notes = member.lifeline.receive()
        if notes is None:
            self._on_ended(member)
            return
        for note in notes:
            self._on_note(member, note)

    def _on_note(self, member: Member, note: FromProcess | ToProcess) -> None:
        if isinstance(note, Ready):
            self._on_ready(member, note)
        elif isinstance(note, Done):
            self._stopping = True
        elif isinstance(note, Failed):
            member.failure = note
        elif isinstance(note, Replace):
            if self._replicas.is_ready(note.replica):
                role = Role("manager", note.replica)
                self._lose(role, Failed(note.reason, "", is_final=not note.again))
        elif self._keeper is not None and isinstance(note, Serving):
            self._keeper.send(Serves())
        elif self._keeper is not None and isinstance(note, MayRetire):
            self._keeper.tell_standing(self._slices, note, self._members.worker_ids())

    def _on_ready(self, member: Member, note: Ready) -> None:
        member.is_ready = True
        if member.role == SERVER or member.is_dismissed:
            return
        if member.role.kind == "http":
            self._http.ready(member)
        else:
            self._replicas.note_ready(member, note)
        self._begin_if_ready()

    def _begin_if_ready(self) -> None:
        """Tells the server to start when everything is ready, or has ended."""
        if not self._has_begun and self._replicas.can_begin and self._http.are_ready:
            self._has_begun = True
            self._replicas.begin()

    # --- the end of a process ---------------------------------------------------------------------

    def _on_ended(self, member: Member) -> None:
        self._members.note_end(member)
        if member.role.kind == "http":
            self._http.living.discard(member)
            self._members.tell_server(Left(member.role.replica))
        if member.is_dismissed:
            member.reap()
            if not self._stopping:
                self._replicas.start_again(member.role.replica)
            return
        failure = member.failure
        if failure is None and not (self._stopping and self._is_clean_end(member)):
            failure = Failed(member.how_it_ended, "")
        if member.role == SERVER:
            self._fail(member.role, failure)
            self._stop_others()
        elif member.role.kind == "http":
            self._lose_http(member, failure)
        elif failure is not None:
            named = Failed(
                f"the {member.role} ended: {failure.summary}", failure.traceback, failure.is_final
            )
            self._lose(member.role, named, failure)

    def _is_clean_end(self, member: Member) -> bool:
        """Whether a process may have ended: in a drain, first the server, then the others."""
        if member.role.kind in ("server", "http"):
            return member.process is None or member.process.wait() == 0
        return not self._members.server_lives

    def _lose_http(self, member: Member, failure: Failed | None) -> None:
        """Starts an HTTP process again that has ended by itself; the last one ends the engine."""
        if failure is None or self._stopping or not self._members.server_lives:
            return
        why_not = self._http.why_not_again(member, failure)
        log.error(
            "the %s ended: %s; it is %s",
            member.role,
            failure.summary,
            "started again" if why_not is None else f"not started again, since {why_not}",
            extra={"traceback": failure.traceback},
        )
        if why_not is None:
            self._launch_http(self._http.next_role(member))
        elif self._http.living:
            self._begin_if_ready()
        else:
            self._fail(member.role, failure)
            self._stop_server(Dead(f"the {member.role} ended: {failure.summary}"), 0.0)

    def _lose(self, role: Role, failure: Failed, bare: Failed | None = None) -> None:
        """Ends the replica of a process, or the engine if nothing is left of it.

        Args:
            role: of the process.
            failure: what happened to it; names it.
            bare: the same, without its name.
        """
        if self._replicas.lose(role.replica, failure, is_stopping=self._stopping):
            self._begin_if_ready()
            return
        self._fail(role, bare or failure)
        if self._members.server_lives:
            self._stop_server(Dead(failure.summary), 0.0)

    def _fail(self, role: Role, failure: Failed | None) -> None:
        """The engine ends because a process has; the first reason counts."""
        if self._failure is None and failure is not None:
            self._failure, self._failed_role = failure, role

    # --- ending -----------------------------------------------------------------------------------

    def _stop_server(self, note: Stop | Dead | Retire, timeout_s: float) -> None:
        self._stopping = True
        self._deadline = time.monotonic() + timeout_s + _FLUSH_S
        if self._members.server_lives:
            self._members.tell_server(note)
            for member in self._http.living:
                member.lifeline.send(note)
        else:
            self._stop_others()

    def _end_others_at_once(self) -> None:
        """Ends all but the server before there was a request, so that they have nothing to finish.

        To hear that they should end, they would first have to load what they are loading.
        """
        for member in self._members.others:
            member.is_dismissed = True
            member.end_at_once()

    def _stop_others(self) -> None:
        self._stopping = True
        self._deadline = time.monotonic() + _FLUSH_S
        why = "it was shut down" if self._failure is None else self._failure.summary
        for member in self._members.living:
            is_http = member.role.kind == "http"
            member.lifeline.send(Dead(f"the server ended: {why}") if is_http else Stop())

    def _kill_all(self) -> None:
        """Kills all processes. The foreground role can end only with toka itself, which exits."""
        self._members.end_all()
        if self._owns_process and any(member.process is None for member in self._members.living):
            if self._failure is not None:
                self._report_failure(self._failure)
            os._exit(1 if self._failure is not None else 130)

    def _report_failure(self, failure: Failed) -> None:
        if self._keeper is not None:
            self._keeper.send(CannotServe(f"the {self._failed_role} ended: {failure.summary}"))
        if self._slices.log_format == "json":
            extra = {"traceback": failure.traceback}
            log.critical("the %s ended: %s", self._failed_role, failure.summary, extra=extra)
            return
        sys.stderr.write(failure.traceback)
        sys.stderr.write(f"toka: the {self._failed_role} ended: {failure.summary}\n")
        sys.stderr.flush()
