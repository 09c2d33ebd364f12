"""The supervisor: starts the processes of an engine, watches them, and ends them.

::

    toka ─┬─ server   (in the foreground of toka itself, unless local_proc_name says otherwise)
          ├─ manager
          ├─ worker
          ├─ managers and workers of further replicas
          └─ HTTP processes, if there are several server processes

One thread watches the lifelines; the foreground role has the main thread. When a process of a
replica dies, the rest of this replica ends, and the replica is started again; meanwhile the server
goes on with the others. ``Restarts`` says when that has failed too often. An engine with one
replica ends with it. An HTTP process that ends is started again as well.

Whatever ends the engine (a signal, an exception, the end of the last replica), it ends in the same
order: first the server, so that every client gets an answer or an error, then the other processes,
then the private directory.

Below a keeper, the keeper handles signals, and notes of it come in their place. Then the engine can
also step down: another serves already, and this one ends with its last request.

A program with an engine of several processes is the server itself (``start`` and ``close``). Then
there is no foreground role, and signals are the program's business.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import selectors
import signal
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import FrameType

from tokasaurus.config.slices import EngineSlices
from tokasaurus.errors import LaunchError
from tokasaurus.launch.http_members import HTTPMembers
from tokasaurus.launch.keeping.engine_end import KeeperEnd
from tokasaurus.launch.keeping.notes import AskStanding, CannotServe, End, Serves, StepDown, Watches
from tokasaurus.launch.leftovers import own_directory, remove_directory, sweep
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
    Lost,
    MayRetire,
    Ready,
    Replace,
    Restored,
    Retire,
    Serving,
    Start,
    Stop,
    Succession,
    ToProcess,
)
from tokasaurus.launch.members import Member, ReplicaProcesses
from tokasaurus.launch.processes import Launcher, LocalLauncher, spawn
from tokasaurus.launch.restarts import Restarts
from tokasaurus.launch.roles import Front, roles_of, run_role
from tokasaurus.launch.timeline import begin_file
from tokasaurus.protocol.role import Role

__all__ = ["Supervisor"]

log = logging.getLogger(__name__)

_INTERRUPT_EVERY_S = 0.1
# Time for the server to answer its clients after a death, and for the others to exit.
_FLUSH_S = 5.0
# A replica that is started again may take this many times as long as the longest first start, which
# loaded the same model on the same machine. It may share the machine with work now.
_START_FACTOR = 5.0
_MIN_START_S = 60.0
_SERVER = Role("server")

# Why the watching thread wakes up.
_STOP = b"s"
_PLACED = b"p"
_USR2 = b"u"


class Supervisor:
    """Owns every process, socket and file of one engine.

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
        self._listener = listener
        self._front = front
        self._launcher = launcher or LocalLauncher()
        # Without HTTP the text core is in this process.
        self._local_role = _SERVER if listener is None else Role(slices.local_proc_name)
        sweep()
        self._directory, self._owner = own_directory()
        self._members: set[Member] = set()  # that live, dismissed ones too
        self._all: list[Member] = []
        self._server: Member | None = None
        self._replicas = {  # that go on, or will after a start
            number: ReplicaProcesses(number, self._directory)
            for number in range(len(slices.replicas))
        }
        self._restarts = Restarts(slices.replica_restarts)
        # The server answers clients itself if it is the only server process.
        self._has_http = listener is not None and slices.server_processes > 1
        self._http = HTTPMembers(
            slices.server_processes if self._has_http else 0, slices.replica_restarts
        )
        self._first_start_s = 0.0  # the longest, of any replica
        self._has_begun = False  # the server was told to start
        # Why the engine ends; None if it was asked to.
        self._failure: Failed | None = None
        self._failed_role = _SERVER
        self._stopping = False
        self._is_retiring = False  # it is stopping, since another engine serves
        self._owns_process = False  # this is toka, which ends with the engine
        self._interrupting = False  # the next SIGINT comes from here, to end the foreground role
        self._foreground_ended = threading.Event()
        self._wake_watcher, self._wake_sender = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        # Replicas that have places for another start, and why not if they have none.
        self._placed: queue.SimpleQueue[tuple[int, LaunchError | None]] = queue.SimpleQueue()
        self._watcher = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._deadline: float | None = None

    def run(self) -> int:
        """Runs the engine until a signal or a death ends it.

        Returns:
            The exit status: 0 after a drain, 1 after a death, 130 if a second signal cut the drain.
        """
        self._owns_process = True
        assignment, lifeline = self._spawn_all()
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
        previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        self._watcher.start()
        try:
            with contextlib.suppress(KeyboardInterrupt):
                run_role(
                    assignment,
                    lifeline,
                    interrupt=self._interrupt_foreground,
                    front=self._front,
                )
            self._foreground_ended.set()
            lifeline.close()
            self._watcher.join()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._clean_up()
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
        self._clean_up()

    def pid(self, role: Role) -> int:
        """The process id of a role that lives in a process of its own on this machine.

        Raises:
            LaunchError: there is none.
        """
        for member in list(self._members):
            process = member.process
            if member.role == role and process is not None and process.pid is not None:
                return process.pid
        raise LaunchError(f"the {role} has no process on this machine")

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
            self._clean_up()
            raise
        return self._assignment(self._local_role), theirs

    def _launch_all(self, local_lifeline: Lifeline) -> None:
        roles = roles_of(self._slices)
        self._launcher.prepare(roles)
        for role in roles:
            if role == self._local_role:
                self._adopt(Member(role, local_lifeline))
            else:
                self._launch(role)
        for role in self._http.first_roles():
            self._launch_http(role)
        for replica in self._replicas.values():
            replica.num_starts, replica.started_at = 1, time.monotonic()

    def _assignment(self, role: Role) -> Assignment:
        doors = self._launcher.doors_of(role)
        if role != _SERVER:
            directory = self._replicas[role.replica].directory
            return Assignment(role, directory, self._slices, doors=doors)
        listens = self._listener is not None and not self._has_http
        fd = self._listener.fileno() if self._listener is not None and listens else None
        return Assignment(role, self._directory, self._slices, fd, self._succession, doors)

    @property
    def _succession(self) -> Succession | None:
        return None if self._keeper is None else self._keeper.succession

    def _launch(self, role: Role) -> None:
        process, lifeline = self._launcher.launch(self._assignment(role))
        self._adopt(Member(role, lifeline, process, self._launcher.where(role)))

    def _launch_http(self, role: Role) -> None:
        """Starts an HTTP process, which is always beside the server."""
        assert self._listener is not None
        fd = self._listener.fileno()
        assignment = Assignment(role, self._directory, self._slices, fd, self._succession)
        process, lifeline = spawn(assignment)
        self._adopt(Member(role, lifeline, process))

    def _adopt(self, member: Member) -> None:
        self._members.add(member)
        self._all.append(member)
        if member.role == _SERVER:
            self._server = member
        elif member.role.kind == "http":
            self._http.living.add(member)
            self._tell_server(Joined(member.role.replica))
        else:
            self._replicas[member.role.replica].members.append(member)
        self._selector.register(member.lifeline, selectors.EVENT_READ, member)

    # --- signals, in the main thread --------------------------------------------------------------

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._interrupting:
            if not self._foreground_ended.is_set():
                raise KeyboardInterrupt
        elif self._keeper is None:  # otherwise it says what to do
            self._wake_sender.send(_USR2 if number == signal.SIGUSR2 else _STOP)

    def _interrupt_foreground(self) -> None:
        """Ends a foreground role that has no event loop; called by its lifeline thread.

        A signal that arrives just before a library makes a blocking call does not end that call, so
        the signal is repeated until the role has returned.
        """
        self._interrupting = True
        while not self._foreground_ended.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            self._foreground_ended.wait(_INTERRUPT_EVERY_S)

    # --- watching, in a thread of its own ---------------------------------------------------------

    def _watch(self) -> None:
        with self._selector as selector:
            while self._members:
                due = [each for each in (self._deadline, self._start_deadline) if each is not None]
                wait = min(due) - time.monotonic() if due else None
                events = selector.select(None if wait is None else max(0.0, wait))
                deadline = self._deadline
                if deadline is not None and not events and time.monotonic() >= deadline:
                    self._kill_all()
                    return
                self._end_slow_starts()
                for key, _ in events:
                    if key.data is None:
                        self._on_woken()
                    elif isinstance(key.data, KeeperEnd):
                        self._on_keeper(key.data)
                    elif not self._on_readable(key.data):
                        selector.unregister(key.fileobj)
                        self._on_ended(key.data)

    @property
    def _start_deadline(self) -> float | None:
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

    def _end_slow_starts(self) -> None:
        """Ends replicas whose second or later start takes too long: a process of them hangs."""
        now, limit_s = time.monotonic(), self._start_limit_s
        for replica in list(self._replicas.values()):
            if limit_s is None or not replica.is_started_again:
                continue
            if now >= replica.started_at + limit_s:
                late = [member for member in replica.members if not member.is_ready]
                reason = f"the {late[0].role} was not ready {limit_s:.0f} s after its start"
                self._lose(late[0].role, Failed(reason, ""))

    def _on_woken(self) -> None:
        reasons = self._wake_watcher.recv(1024)
        while not self._placed.empty():
            self._on_placed(*self._placed.get())
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
                self._tell_server(AskRetire())
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

    def _on_readable(self, member: Member) -> bool:
        notes = member.lifeline.receive()
        if notes is None:
            return False
        for note in notes:
            self._on_note(member, note)
        return True

    def _on_note(self, member: Member, note: FromProcess | ToProcess) -> None:
        if isinstance(note, Ready):
            self._on_ready(member, note)
        elif isinstance(note, Done):
            self._stopping = True
        elif isinstance(note, Failed):
            member.failure = note
        elif isinstance(note, Replace):
            replica = self._replicas.get(note.replica)
            if replica is not None and replica.is_ready:
                role = replica.members[0].role
                self._lose(role, Failed(note.reason, "", is_final=not note.again))
        elif self._keeper is not None and isinstance(note, Serving):
            self._keeper.send(Serves())
        elif self._keeper is not None and isinstance(note, MayRetire):
            self._keeper.tell_standing(self._slices, note, self._worker_ids())

    def _worker_ids(self) -> list[int]:
        """The process ids of the workers on this machine."""
        workers = [each for each in self._members if each.role.kind == "worker"]
        pids = [os.getpid() if each.process is None else each.process.pid for each in workers]
        return [pid for pid in pids if pid is not None]

    def _on_ready(self, member: Member, note: Ready) -> None:
        member.is_ready = True
        if member.role == _SERVER or member.is_dismissed:
            return
        if member.role.kind == "http":
            self._http.ready(member)
            self._begin_if_ready()
            return
        replica = self._replicas[member.role.replica]
        if member.role.kind == "worker":
            member.worker = note.worker
            for other in replica.members:
                if other.role.kind == "manager":
                    other.lifeline.send(note)
        if replica.is_ready:
            self._restarts.ready(replica.number)
            if replica.num_starts == 1:
                took_s = time.monotonic() - replica.started_at
                self._first_start_s = max(self._first_start_s, took_s)
            if self._has_begun:
                self._tell_restored(replica)
            self._begin_if_ready()

    def _begin_if_ready(self) -> None:
        """Tells the server to start when each replica is ready or has ended, and one is ready."""
        replicas = self._replicas.values()
        ready = [replica for replica in replicas if replica.is_ready]
        is_first = any(each.num_starts == 1 and each.is_starting for each in replicas)
        if self._has_begun or is_first or not ready or not self._http.are_ready:
            return
        self._has_begun = True
        workers = {each.number: each.workers for each in ready if each.num_starts == 1}
        self._tell_server(Start(workers))
        for replica in ready:
            if replica.num_starts > 1:
                self._tell_restored(replica)

    def _tell_restored(self, replica: ReplicaProcesses) -> None:
        log.warning("replica %d is ready again", replica.number)
        doors = self._launcher.server_doors_of(replica.number)
        self._tell_server(Restored(replica.number, replica.directory, replica.workers, doors))

    def _tell_server(self, note: ToProcess) -> None:
        if self._server is not None:
            self._server.lifeline.send(note)

    def _on_ended(self, member: Member) -> None:
        self._members.discard(member)
        member.lifeline.close()
        if member.role.kind == "http":
            self._http.living.discard(member)
            self._tell_server(Left(member.role.replica))
        if member.is_dismissed:
            member.reap()
            if not self._stopping:
                self._start_again(member.role.replica)
            return
        failure = member.failure
        if failure is None and not (self._stopping and self._is_clean_end(member)):
            failure = Failed(member.how_it_ended, "")
        if member is self._server:
            self._fail(member.role, failure)
            self._stop_others()
        elif member.role.kind == "http":
            self._lose_http(member, failure)
        elif failure is not None:
            named = Failed(
                f"the {member.role} ended: {failure.summary}", failure.traceback, failure.is_final
            )
            self._lose(member.role, named, failure)

    def _lose_http(self, member: Member, failure: Failed | None) -> None:
        """Starts an HTTP process again that has ended by itself; the last one ends the engine."""
        if failure is None or self._stopping or self._server not in self._members:
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

    # --- the end of a replica ---------------------------------------------------------------------

    def _lose(self, role: Role, failure: Failed, bare: Failed | None = None) -> None:
        """Ends a replica that has lost a process, and starts it again; or ends the engine.

        Args:
            role: of the process.
            failure: what happened to it; names it.
            bare: the same, without its name.
        """
        replica = self._replicas.get(role.replica)
        if replica is None:
            return
        why_not = self._why_not_again(replica, failure)
        is_last = len(self._replicas) == 1 and why_not is not None
        if is_last or self._server not in self._members:
            self._fail(role, bare or failure)
            if self._server in self._members:
                self._stop_server(Dead(failure.summary), 0.0)
            return
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
            if member in self._members:
                member.end_at_once()
        self._tell_server(Lost(replica.number, failure.summary, starts_again=why_not is None))
        self._begin_if_ready()
        self._start_again(replica.number)

    def _why_not_again(self, replica: ReplicaProcesses, failure: Failed) -> str | None:
        """Why a replica is not started again; None if it is."""
        if len(self._slices.replicas) == 1:
            return "it is the only one"
        if self._stopping:
            return "the engine is shutting down"
        if failure.is_final:
            return "it would end in the same way"
        if any(member.process is None for member in replica.members):
            return f"its {self._local_role} runs in the foreground"
        return self._restarts.ended(replica.number)

    def _count_others(self, replica: ReplicaProcesses) -> str:
        num_ready = sum(each.is_ready for each in self._replicas.values() if each is not replica)
        return "1 replica goes on" if num_ready == 1 else f"{num_ready} replicas go on"

    def _start_again(self, number: int) -> None:
        """Finds places for a replica, once its former processes are gone and its devices free."""
        replica = self._replicas.get(number)
        if replica is None or self._server not in self._members:
            return
        if any(each in self._members or not each.is_dismissed for each in replica.members):
            return
        replica.move(self._directory)
        replica.num_starts += 1
        roles = [member.role for member in replica.members]
        replica.members = []
        self._launcher.prepare_again(roles, partial(self._note_placed, number))

    def _note_placed(self, number: int, problem: LaunchError | None) -> None:
        """Tells the watching thread; in any thread."""
        self._placed.put((number, problem))
        self._wake_sender.send(_PLACED)

    def _on_placed(self, number: int, problem: LaunchError | None) -> None:
        """Starts a replica that has places again."""
        replica = self._replicas.get(number)
        if replica is None or self._stopping:
            return
        roles = [role for role in roles_of(self._slices) if self._is_of(role, number)]
        if problem is not None:
            self._lose(roles[0], Failed(f"replica {number}: {problem}", "", is_final=True))
            return
        replica.started_at = time.monotonic()
        for role in roles:
            self._launch(role)

    def _is_of(self, role: Role, replica: int) -> bool:
        return role != _SERVER and role.replica == replica

    def _fail(self, role: Role, failure: Failed | None) -> None:
        """The engine ends because a process has; the first reason counts."""
        if self._failure is None and failure is not None:
            self._failure, self._failed_role = failure, role

    def _is_clean_end(self, member: Member) -> bool:
        """Whether a process may have ended: in a drain, first the server, then the others."""
        if member is not self._server and member.role.kind != "http":
            return self._server not in self._members
        return member.process is None or member.process.wait() == 0

    # --- ending -----------------------------------------------------------------------------------

    def _stop_server(self, note: Stop | Dead | Retire, timeout_s: float) -> None:
        self._stopping = True
        self._deadline = time.monotonic() + timeout_s + _FLUSH_S
        if self._server in self._members:
            self._tell_server(note)
            for member in self._http.living:
                member.lifeline.send(note)
        else:
            self._stop_others()

    def _end_others_at_once(self) -> None:
        """Ends all but the server before there was a request, so that they have nothing to finish.

        To hear that they should end, they would first have to load what they are loading.
        """
        for member in self._members - {self._server}:
            member.is_dismissed = True
            member.end_at_once()

    def _stop_others(self) -> None:
        self._stopping = True
        self._deadline = time.monotonic() + _FLUSH_S
        why = "it was shut down" if self._failure is None else self._failure.summary
        for member in self._members:
            is_http = member.role.kind == "http"
            member.lifeline.send(Dead(f"the server ended: {why}") if is_http else Stop())

    def _kill_all(self) -> None:
        """Kills all processes. The foreground role can end only with toka itself, which exits."""
        self._clean_up()
        if self._owns_process and any(member.process is None for member in self._members):
            if self._failure is not None:
                self._report_failure(self._failure)
            os._exit(1 if self._failure is not None else 130)

    def _clean_up(self) -> None:
        processes = [member.process for member in self._all if member.process is not None]
        for process in processes:
            process.kill()
        # An outpost that is busy obeys late; its processes count as ended once it is dismissed.
        self._launcher.close()
        for process in processes:
            process.wait()
        if self._listener is not None:
            self._listener.close()
        remove_directory(self._directory, self._owner)

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
