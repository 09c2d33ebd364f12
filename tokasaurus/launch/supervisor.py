"""The supervisor: starts the processes of an engine, watches them, and ends them.

::

    toka ─┬─ server   (in the foreground of toka itself, unless local_proc_name says otherwise)
          ├─ manager
          ├─ worker
          └─ managers and workers of further replicas

One thread watches the lifelines; the foreground role has the main thread. When a process of a
replica dies, the rest of this replica ends; while others are left, the server goes on with these.

Whatever ends the engine (a signal, an exception, the end of the last replica), it ends in the same
order: first the server, so that every client gets an answer or an error, then the other processes,
then the private directory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from tokasaurus.config.slices import EngineSlices
from tokasaurus.launch.leftovers import own_directory, sweep
from tokasaurus.launch.lifeline import (
    Assignment,
    Dead,
    Done,
    Failed,
    FromProcess,
    Lifeline,
    Lost,
    Ready,
    Start,
    Stop,
    ToProcess,
)
from tokasaurus.launch.processes import Launcher, LocalLauncher, Process, how_it_ended
from tokasaurus.launch.roles import Front, roles_of, run_role
from tokasaurus.launch.timeline import begin_file
from tokasaurus.protocol.identity import WorkerIdentity
from tokasaurus.protocol.role import Role

__all__ = ["Supervisor"]

log = logging.getLogger(__name__)

_INTERRUPT_EVERY_S = 0.1
# Time for the server to answer its clients after a death, and for the others to exit.
_FLUSH_S = 5.0
_SERVER = Role("server")


class Supervisor:
    """Owns every process, socket and file of one engine.

    Args:
        slices: the resolved configuration.
        listener: the server's listening socket, which the supervisor closes; None without HTTP.
        front: what runs in the foreground in the server's place; None serves.
        launcher: starts the other processes, and is closed at the end; None starts them here.
    """

    def __init__(
        self,
        slices: EngineSlices,
        listener: socket.socket | None,
        front: Front | None = None,
        launcher: Launcher | None = None,
    ) -> None:
        self._slices = slices
        self._listener = listener
        self._front = front
        self._launcher = launcher or LocalLauncher()
        self._local_role = Role(slices.local_proc_name) if front is None else _SERVER
        sweep()
        self._directory, self._owner = own_directory()
        self._processes: dict[Role, Process] = {}
        self._lifelines: dict[Role, Lifeline] = {}
        self._alive: set[Role] = set()
        self._awaited: set[Role] = set()  # not ready yet
        self._workers: dict[Role, WorkerIdentity] = {}  # that are ready
        self._failed: dict[Role, Failed] = {}  # what each said before its end
        self._replicas = set(range(len(slices.replicas)))  # that go on
        # Why the engine ends; None if it was asked to.
        self._failure: Failed | None = None
        self._failed_role = _SERVER
        self._stopping = False
        self._interrupting = False  # the next SIGINT comes from here, to end the foreground role
        self._foreground_ended = threading.Event()
        self._wake_watcher, self._wake_sender = socket.socketpair()
        self._deadline: float | None = None

    def run(self) -> int:
        """Runs the engine until a signal or a death ends it.

        Returns:
            The exit status: 0 after a drain, 1 after a death, 130 if a second signal cut the drain.
        """
        if self._slices.profile_path is not None:
            begin_file(Path(self._slices.profile_path).expanduser())
        roles = roles_of(self._slices)
        self._awaited.update(role for role in roles if role != _SERVER)
        self._launcher.prepare(roles)
        for role in roles:
            if role != self._local_role:
                self._spawn(role)
        ours, theirs = Lifeline.pair()
        self._adopt(self._local_role, ours)
        previous = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        watcher = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        watcher.start()
        try:
            with contextlib.suppress(KeyboardInterrupt):
                run_role(
                    self._assignment(self._local_role),
                    theirs,
                    interrupt=self._interrupt_foreground,
                    front=self._front,
                )
            self._foreground_ended.set()
            theirs.close()
            watcher.join()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._clean_up()
        if self._failure is not None:
            self._report_failure(self._failure)
            return 1
        return 0

    # --- starting ---------------------------------------------------------------------------------

    def _assignment(self, role: Role) -> Assignment:
        listener = self._listener if role == _SERVER else None
        fd = None if listener is None else listener.fileno()
        doors = self._launcher.doors_of(role)
        return Assignment(role, self._directory, self._slices, fd, doors)

    def _spawn(self, role: Role) -> None:
        self._processes[role], lifeline = self._launcher.launch(self._assignment(role))
        self._adopt(role, lifeline)

    def _adopt(self, role: Role, lifeline: Lifeline) -> None:
        self._lifelines[role] = lifeline
        self._alive.add(role)

    # --- signals, in the main thread --------------------------------------------------------------

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._interrupting:
            self._wake_sender.send(b"s")
        elif not self._foreground_ended.is_set():
            raise KeyboardInterrupt

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
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_watcher, selectors.EVENT_READ, None)
            for role, lifeline in self._lifelines.items():
                selector.register(lifeline, selectors.EVENT_READ, role)
            while self._alive:
                wait = None if self._deadline is None else self._deadline - time.monotonic()
                events = selector.select(None if wait is None else max(0.0, wait))
                if not events:
                    self._kill_all()
                    return
                for key, _ in events:
                    if key.data is None:
                        self._on_stop_requested()
                    elif not self._on_readable(key.data):
                        selector.unregister(key.fileobj)
                        self._on_ended(key.data)

    def _on_stop_requested(self) -> None:
        self._wake_watcher.recv(1024)
        if self._stopping:
            log.warning("stopping at once")
            self._kill_all()
            return
        log.info("draining (a second signal stops at once)")
        self._stop_server(Stop(), self._slices.server.shutdown_timeout_s)

    def _on_readable(self, role: Role) -> bool:
        notes = self._lifelines[role].receive()
        if notes is None:
            return False
        for note in notes:
            self._on_note(role, note)
        return True

    def _on_note(self, role: Role, note: FromProcess | ToProcess) -> None:
        if isinstance(note, Ready):
            if role.kind == "worker":
                self._lifelines[Role("manager", role.replica)].send(note)
                if note.worker is not None:
                    self._workers[role] = note.worker
            self._no_longer_awaited({role})
        elif isinstance(note, Done):
            self._stopping = True
        elif isinstance(note, Failed):
            self._failed[role] = note

    def _no_longer_awaited(self, roles: set[Role]) -> None:
        """Tells the server to start when the last of the processes that it waits for is ready."""
        if self._awaited and self._awaited <= roles:
            workers = [self._workers.get(role) for role in roles_of(self._slices)]
            self._lifelines[_SERVER].send(Start(tuple(filter(None, workers))))
        self._awaited -= roles

    def _on_ended(self, role: Role) -> None:
        self._alive.discard(role)
        failure = self._failed.get(role)
        if failure is None and not (self._stopping and self._is_clean_end(role)):
            failure = Failed(self._how_it_ended(role), "")
        if role == _SERVER:
            self._fail(role, failure)
            self._stop_others()
        elif role.replica in self._replicas and failure is not None:
            self._lose(role, failure)

    def _lose(self, role: Role, failure: Failed) -> None:
        """Ends a replica after the end of one of its processes, and the engine with the last."""
        reason = f"the {role} ended: {failure.summary}"
        if len(self._replicas) == 1 or _SERVER not in self._alive:
            self._fail(role, failure)
            if _SERVER in self._alive:
                self._stop_server(Dead(reason), 0.0)
            return
        self._replicas.remove(role.replica)
        num_left = len(self._replicas)
        others = "1 replica goes on" if num_left == 1 else f"{num_left} replicas go on"
        log.error("%s%s; %s", failure.traceback, reason, others)
        rest = {each for each in self._lifelines if self._is_of_replica(each, role.replica)}
        for each in rest & self._alive:
            self._end_at_once(each)
        self._lifelines[_SERVER].send(Lost(role.replica, reason))
        self._no_longer_awaited(rest)

    def _is_of_replica(self, role: Role, replica: int) -> bool:
        return role != _SERVER and role.replica == replica

    def _end_at_once(self, role: Role) -> None:
        """Ends a manager or a worker, which have nothing to save."""
        process = self._processes.get(role)
        if process is None:  # the foreground's
            self._lifelines[role].send(Stop())
        else:
            process.kill()

    def _fail(self, role: Role, failure: Failed | None) -> None:
        """The engine ends because a process has; the first reason counts."""
        if self._failure is None and failure is not None:
            self._failure, self._failed_role = failure, role

    def _is_clean_end(self, role: Role) -> bool:
        """Whether a process may have ended: in a drain, first the server, then the others."""
        if role != _SERVER:
            return _SERVER not in self._alive
        process = self._processes.get(role)
        return process is None or process.wait() == 0

    def _how_it_ended(self, role: Role) -> str:
        process = self._processes.get(role)
        if process is None:
            return "it returned without being asked to"
        return how_it_ended(process) + self._launcher.where(role)

    # --- ending -----------------------------------------------------------------------------------

    def _stop_server(self, note: Stop | Dead, timeout_s: float) -> None:
        self._stopping = True
        self._deadline = time.monotonic() + timeout_s + _FLUSH_S
        if _SERVER in self._alive:
            self._lifelines[_SERVER].send(note)
        else:
            self._stop_others()

    def _stop_others(self) -> None:
        self._stopping = True
        self._deadline = time.monotonic() + _FLUSH_S
        for role in list(self._alive):
            self._lifelines[role].send(Stop())

    def _kill_all(self) -> None:
        """Kills all processes. The foreground role can end only with toka itself, which exits."""
        self._clean_up()
        if self._local_role in self._alive:
            if self._failure is not None:
                self._report_failure(self._failure)
            os._exit(1 if self._failure is not None else 130)

    def _clean_up(self) -> None:
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()
        self._launcher.close()
        if self._listener is not None:
            self._listener.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        self._owner.close()

    def _report_failure(self, failure: Failed) -> None:
        sys.stderr.write(failure.traceback)
        sys.stderr.write(f"toka: the {self._failed_role} ended: {failure.summary}\n")
        sys.stderr.flush()
