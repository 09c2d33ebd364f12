"""The supervisor: starts the processes of an engine, watches them, and ends them.

::

    toka ─┬─ server   (in the foreground of toka itself, unless local_proc_name says otherwise)
          ├─ manager
          └─ worker

One thread watches the lifelines; the foreground role has the main thread. Whatever ends the engine
(a signal, an exception, a killed process), it ends in the same order: first the server, so that
every client gets an answer or an error, then the other processes, then the private directory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from types import FrameType

from tokasaurus.config.slices import EngineSlices
from tokasaurus.launch.lifeline import (
    Assignment,
    Dead,
    Done,
    Failed,
    FromProcess,
    Lifeline,
    Ready,
    Start,
    Stop,
    ToProcess,
)
from tokasaurus.launch.roles import ROLES, Front, run_role

__all__ = ["Supervisor"]

log = logging.getLogger(__name__)

_INTERRUPT_EVERY_S = 0.1
# Time for the server to answer its clients after a death, and for the others to exit.
_FLUSH_S = 5.0


class Supervisor:
    """Owns every process, socket and file of one engine.

    Args:
        slices: the resolved configuration.
        listener: the server's listening socket, which the supervisor closes; None without HTTP.
        front: what runs in the foreground in the server's place; None serves.
    """

    def __init__(
        self, slices: EngineSlices, listener: socket.socket | None, front: Front | None = None
    ) -> None:
        self._slices = slices
        self._listener = listener
        self._front = front
        self._local_role = slices.local_proc_name if front is None else "server"
        self._directory = tempfile.mkdtemp(prefix="tokasaurus-")
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._lifelines: dict[str, Lifeline] = {}
        self._alive: set[str] = set()
        self._ready: set[str] = set()
        self._failure: Failed | None = None
        self._failed_role = ""
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
        for role in ROLES:
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

    def _assignment(self, role: str) -> Assignment:
        listener = self._listener if role == "server" else None
        fd = None if listener is None else listener.fileno()
        return Assignment(role, self._directory, self._slices, fd)

    def _spawn(self, role: str) -> None:
        ours, theirs = Lifeline.pair()
        passed = [theirs.fileno()]
        if role == "server" and self._listener is not None:
            passed.append(self._listener.fileno())
        self._processes[role] = subprocess.Popen(
            [sys.executable, "-m", "tokasaurus.launch.child", str(theirs.fileno())],
            pass_fds=passed,
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._adopt(role, ours)
        ours.send(self._assignment(role))

    def _adopt(self, role: str, lifeline: Lifeline) -> None:
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

    def _on_readable(self, role: str) -> bool:
        notes = self._lifelines[role].receive()
        if notes is None:
            return False
        for note in notes:
            self._on_note(role, note)
        return True

    def _on_note(self, role: str, note: FromProcess | ToProcess) -> None:
        if isinstance(note, Ready):
            self._ready.add(role)
            if self._ready >= {"manager", "worker"} and role != "server":
                self._lifelines["server"].send(Start())
        elif isinstance(note, Done):
            self._stopping = True
        elif isinstance(note, Failed) and self._failure is None:
            self._failure, self._failed_role = note, role

    def _on_ended(self, role: str) -> None:
        self._alive.discard(role)
        if self._failure is None and not (self._stopping and self._is_clean_end(role)):
            self._failure = Failed(self._how_it_ended(role), "")
            self._failed_role = role
        if role == "server":
            self._stop_others()
        elif self._failure is not None and "server" in self._alive:
            reason = f"the {self._failed_role} ended: {self._failure.summary}"
            self._stop_server(Dead(reason), 0.0)

    def _is_clean_end(self, role: str) -> bool:
        """Whether a process may have ended: in a drain, first the server, then the others."""
        if role != "server":
            return "server" not in self._alive
        process = self._processes.get(role)
        return process is None or process.wait() == 0

    def _how_it_ended(self, role: str) -> str:
        process = self._processes.get(role)
        if process is None:
            return "it returned without being asked to"
        status = process.wait()
        if status >= 0:
            return f"exit status {status}"
        name = signal.Signals(-status).name
        hint = "; perhaps the system ran out of memory" if status == -signal.SIGKILL else ""
        return f"killed by {name}{hint}"

    # --- ending -----------------------------------------------------------------------------------

    def _stop_server(self, note: Stop | Dead, timeout_s: float) -> None:
        self._stopping = True
        self._deadline = time.monotonic() + timeout_s + _FLUSH_S
        if "server" in self._alive:
            self._lifelines["server"].send(note)
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
            if process.poll() is None:
                process.kill()
        for process in self._processes.values():
            process.wait()
        if self._listener is not None:
            self._listener.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _report_failure(self, failure: Failed) -> None:
        sys.stderr.write(failure.traceback)
        sys.stderr.write(f"toka: the {self._failed_role} ended: {failure.summary}\n")
        sys.stderr.flush()
