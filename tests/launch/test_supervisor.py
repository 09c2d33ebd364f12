"""The supervisor's own thread and signals, with a stand-in for the role in the foreground."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from tokasaurus.config.parser import parse_command_line
from tokasaurus.launch import foreground, supervisor
from tokasaurus.launch.assemble import assemble
from tokasaurus.launch.lifeline import Lifeline, Stop
from tokasaurus.launch.processes import LocalLauncher
from tokasaurus.protocol.role import Role


def test_a_lost_interrupt_is_sent_again(monkeypatch):
    """A library that is about to block notices a signal only when its blocking call ends."""
    interrupts = []

    def loses_the_first_interrupt(assignment, lifeline, interrupt, front):
        def await_stop():
            assert any(isinstance(note, Stop) for note in lifeline.receive())
            interrupt()

        threading.Thread(target=await_stop, daemon=True).start()
        timers = [threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))]
        for _ in range(2):
            try:
                while timers:
                    timers.pop().start()
                time.sleep(60)
            except KeyboardInterrupt:
                interrupts.append(time.monotonic())
        lifeline.close()

    slices = assemble(parse_command_line([".dmanager"], {}))
    monkeypatch.setattr(supervisor, "roles_of", lambda slices: [Role("manager")])
    monkeypatch.setattr(foreground, "run_role", loses_the_first_interrupt)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert supervisor.Supervisor(slices, listener).run() == 0
    assert len(interrupts) == 2


class FailingLauncher(LocalLauncher):
    """Starts one process, and then the system has no room for another."""

    def __init__(self):
        super().__init__()
        self.started = []

    def launch(self, assignment):
        if self.started:
            raise OSError("no more processes")
        process, lifeline = super().launch(assignment)
        self.started.append(process)
        return process, lifeline


def test_a_start_that_fails_half_way_leaves_no_process():
    launcher = FailingLauncher()
    made = supervisor.Supervisor(assemble(parse_command_line([], {})), None, launcher=launcher)
    with pytest.raises(OSError, match="no more processes"):
        made.start()
    (process,) = launcher.started
    assert process.wait() == -signal.SIGKILL


class HangingLauncher(LocalLauncher):
    """Starts processes that never hear anything."""

    def __init__(self):
        self.started = []

    def launch(self, assignment):
        ours, theirs = Lifeline.pair()
        command = [sys.executable, "-c", "import time; time.sleep(600)"]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        self.started.append(process)
        return process, ours


def test_an_engine_that_is_not_ready_does_not_wait_for_its_processes(monkeypatch):
    """They have nothing to finish, and may be busy with a model for minutes."""

    def serves(assignment, lifeline, interrupt, front):
        os.kill(os.getpid(), signal.SIGTERM)
        while not any(isinstance(note, Stop) for note in lifeline.receive()):
            pass
        lifeline.close()

    launcher = HangingLauncher()
    monkeypatch.setattr(foreground, "run_role", serves)
    monkeypatch.setattr(supervisor, "_FLUSH_S", 600.0)
    # If the supervisor does not end them, the test fails after a while.
    too_late = threading.Timer(60, lambda: [each.terminate() for each in launcher.started])
    too_late.start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        slices = assemble(parse_command_line([], {}))
        assert supervisor.Supervisor(slices, listener, launcher=launcher).run() == 0
    too_late.cancel()
    assert [each.wait() for each in launcher.started] == 2 * [-signal.SIGKILL]


def test_the_end_of_a_lifeline_is_the_end_of_its_process():
    """The supervisor waits for the process then, and hears nothing else meanwhile."""
    program = (
        "import atexit, runpy, sys, time; atexit.register(time.sleep, 600);"
        "runpy.run_module('tokasaurus.launch.child', run_name='__main__')"
    )
    ours, theirs = Lifeline.pair()
    command = [sys.executable, "-c", program, str(theirs.fileno())]
    with subprocess.Popen(command, pass_fds=[theirs.fileno()]) as process:
        theirs.close()
        ours.close()
        try:
            assert process.wait(30) == 1
        finally:
            process.kill()
