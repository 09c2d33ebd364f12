"""Processes at outposts: real managers, started over loopback as if by another machine."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from engine_process import eventually

from tokasaurus.config.engine import EngineConfig
from tokasaurus.errors import LaunchError
from tokasaurus.launch.doors import TO_MANAGER, TO_SERVER
from tokasaurus.launch.lifeline import Assignment, Failed, Lifeline, Ready, Stop
from tokasaurus.launch.machine import Machine
from tokasaurus.launch.process import how_it_ended
from tokasaurus.launch.remote import outpost as outpost_module
from tokasaurus.launch.remote import outposts as outposts_module
from tokasaurus.launch.remote.launcher import Place, RemoteLauncher
from tokasaurus.launch.remote.outpost import Outpost
from tokasaurus.launch.remote.outposts import Outposts
from tokasaurus.planner.configuration import simulated_slices
from tokasaurus.protocol.channels import Receiver, Sender
from tokasaurus.protocol.commands import Command, CommandDone, FlushCache
from tokasaurus.protocol.doors import Door
from tokasaurus.protocol.role import Role

pytestmark = [pytest.mark.engine, pytest.mark.processes]

SECRET = "a secret of thirty-two characters"
ONE = simulated_slices(EngineConfig(kv_cache_num_tokens=8192, log_level="WARNING"))
SLICES = replace(ONE, replicas=ONE.replicas * 2)
MANAGERS = [Role("manager", 0), Role("manager", 1)]
PLACES = {
    **{role: Place(role.replica) for role in MANAGERS},
    **{Role("worker", replica): Place(replica) for replica in range(2)},
}


class RunningOutpost:
    """An outpost in a thread of this process. Its children are processes."""

    def __init__(self, address: tuple[str, int], index: int, **options: object) -> None:
        self.outpost = Outpost(address, SECRET, index, **options)
        self.error: LaunchError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.outpost.run(patience_s=2)
        except LaunchError as error:
            self.error = error

    def wait(self, timeout_s: float = 20) -> None:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the outpost goes on"


class Cluster:
    """A supervisor's side with two outposts."""

    def __init__(self, silence_s: float = 15, through: Callable | None = None) -> None:
        self.outposts = Outposts("127.0.0.1", SECRET, silence_s)
        self.launcher = RemoteLauncher(self.outposts, PLACES)
        self.started: dict[Role, tuple] = {}
        self.doors: dict[str, Door] = {}  # as the server sees them
        address = self.outposts.address
        self.running = [
            RunningOutpost(
                through(address) if through and index else address, index, silence_s=silence_s
            )
            for index in range(2)
        ]
        self.launcher.await_outposts(20)

    def launch(self, *roles: Role, slices=SLICES) -> None:
        if self.doors:
            self.launcher.prepare(roles)
            for role in roles:
                self.doors.update(self.launcher.server_doors_of(role.replica))
        else:
            self.launcher.prepare([Role("server"), *PLACES])
            self.doors = self.launcher.doors_of(Role("server"))
        for role in roles:
            doors = self.launcher.doors_of(role)
            self.started[role] = self.launcher.launch(Assignment(role, "", slices, doors=doors))

    def lifeline(self, role: Role) -> Lifeline:
        return self.started[role][1]

    def notes(self, role: Role) -> list | None:
        """The next notes of a process; None at its end."""
        notes = self.lifeline(role).receive()
        while notes == []:
            notes = self.lifeline(role).receive()
        return notes

    def pids(self) -> list[int]:
        """Of all processes at the outposts."""
        return [
            process.pid for each in self.running for process, _ in each.outpost._children.values()
        ]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    yield made
    made.launcher.close()
    for each in made.running:
        each.wait()


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def answers(doors, replica: int) -> None:
    """Asks a manager, over its door and the server's."""
    door = Receiver(doors[str(Role("server", replica))], TO_SERVER)
    sender = Sender(doors[str(Role("manager", replica))], TO_MANAGER)
    sender.send(Command(5, FlushCache()))
    messages = door.receive(20)
    while not any(isinstance(each, CommandDone) for each in messages):
        more = door.receive(20)
        assert more, messages
        messages += more
    sender.close()
    door.close()


def test_processes_at_outposts_are_like_those_here(cluster):
    cluster.launch(*MANAGERS)
    for role in MANAGERS:
        assert cluster.notes(role) == [Ready()]
        cluster.lifeline(role).send(Ready())  # its worker's
        answers(cluster.doors, role.replica)
    process, _ = cluster.started[MANAGERS[0]]
    process.kill()
    assert how_it_ended(process).startswith("killed by SIGKILL")
    assert cluster.launcher.where(MANAGERS[0]) == f" on {socket.gethostname()}"
    assert cluster.notes(MANAGERS[0]) is None
    cluster.lifeline(MANAGERS[1]).send(Stop())
    assert cluster.notes(MANAGERS[1]) is None
    assert cluster.started[MANAGERS[1]][0].wait() == 0
    # And one of them again, with new doors.
    cluster.launch(MANAGERS[0])
    assert cluster.notes(MANAGERS[0]) == [Ready()]
    cluster.lifeline(MANAGERS[0]).send(Ready())
    answers(cluster.doors, 0)


def test_the_end_of_the_supervisor_ends_processes_and_outposts(cluster):
    cluster.launch(*MANAGERS)
    for role in MANAGERS:
        cluster.notes(role)
    pids = cluster.pids()
    assert len(pids) == 2
    cluster.outposts._at(0).link.end()  # without a word
    cluster.running[0].wait()
    assert "ended" in str(cluster.running[0].error)
    cluster.launcher.close()  # with a word
    cluster.running[1].wait()
    assert cluster.running[1].error is None
    assert all(map(is_gone, pids))


def test_the_end_of_an_outpost_is_the_end_of_what_ran_there(cluster, monkeypatch):
    monkeypatch.setattr(outpost_module, "_EXIT_S", 0.5)
    cluster.launch(*MANAGERS)
    for role in MANAGERS:
        cluster.notes(role)
        cluster.lifeline(role).send(Ready())  # its worker's
    pids = cluster.pids()
    cluster.running[1].outpost._is_dismissed = True  # it leaves at its next beat
    os.kill(pids[1], signal.SIGSTOP)  # and what it leaves behind may hang
    assert cluster.notes(MANAGERS[1]) is None
    process, _ = cluster.started[MANAGERS[1]]
    assert process.wait() is None
    assert how_it_ended(process) == "lost the connection"
    cluster.running[1].wait()
    assert is_gone(pids[1])
    answers(cluster.doors, 0)


class Wire:
    """Passes bytes between an outpost and its supervisor, until it is cut without a sign."""

    def __init__(self) -> None:
        self.is_cut = False
        self._sockets: list[socket.socket] = []

    def __call__(self, address: tuple[str, int]) -> tuple[str, int]:
        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, args=(listener, address), daemon=True).start()
        return listener.getsockname()[:2]

    def _accept(self, listener: socket.socket, address: tuple[str, int]) -> None:
        outer, inner = listener.accept()[0], socket.create_connection(address)
        self._sockets = [listener, outer, inner]
        for pair in ((outer, inner), (inner, outer)):
            threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        while data := source.recv(1 << 16):
            if not self.is_cut:
                sink.sendall(data)
        if not self.is_cut:
            with contextlib.suppress(OSError):  # the other side may have closed it
                sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for each in self._sockets:
            each.close()


def test_a_machine_that_vanishes_without_a_sign_is_noticed_by_both_sides():
    wire = Wire()
    cluster = Cluster(silence_s=2.5, through=wire)
    cluster.launch(*MANAGERS)
    for role in MANAGERS:
        cluster.notes(role)
    pids = cluster.pids()
    time.sleep(4)  # beats keep the link alive
    assert cluster.outposts.missing([0, 1]) == []
    wire.is_cut = True
    assert cluster.notes(MANAGERS[1]) is None
    assert cluster.started[MANAGERS[1]][0].wait() is None
    cluster.running[1].wait()
    assert "silent for 2.5 s" in str(cluster.running[1].error)
    eventually(lambda: is_gone(pids[1]), "its manager ends")
    assert not is_gone(pids[0])
    cluster.launcher.close()
    wire.close()


def test_a_model_that_is_not_on_the_other_machine_is_named(cluster):
    (replica, other) = SLICES.replicas
    worker = replace(replica.workers[0], model_path="/models/elsewhere")
    slices = replace(
        SLICES,
        server=replace(SLICES.server, model_root="/models/elsewhere"),
        replicas=(replace(replica, workers=(worker,)), other),
    )
    role = Role("worker", 0)
    cluster.launch(role, slices=slices)
    (failed,) = cluster.notes(role)
    assert isinstance(failed, Failed)
    assert f"on {socket.gethostname()}: model=/models/elsewhere: no such dir" in failed.summary
    assert "must be at the same path on every machine" in failed.summary
    assert cluster.started[role][0].wait() == 1


def test_an_outpost_that_does_not_belong_is_refused(cluster, monkeypatch):
    twin = RunningOutpost(cluster.outposts.address, 1)
    twin.wait()
    assert "outpost 1 has joined already" in str(twin.error)
    monkeypatch.setattr(outposts_module, "__version__", "9.9")
    stranger = RunningOutpost(cluster.outposts.address, 2)
    stranger.wait()
    assert "and the supervisor has 9.9" in str(stranger.error)
    assert cluster.outposts.missing([0, 1, 2]) == [2]


def test_an_outpost_that_does_not_come_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    outposts = Outposts("127.0.0.1", SECRET)
    launcher = RemoteLauncher(outposts, PLACES)
    running = RunningOutpost(outposts.address, 0)
    with pytest.raises(LaunchError, match="1 of 2 outposts have not joined within 1 s: 1"):
        launcher.await_outposts(1)
    launcher.close()
    running.wait()
    lonely = RunningOutpost(outposts.address, 0)
    lonely.wait()
    assert "does not answer" in str(lonely.error)
    assert [*tmp_path.iterdir()] == []  # nor does the directory of either stay


def test_what_only_the_server_needs_does_not_travel(cluster):
    seen = []
    cluster.outposts.begin = lambda index, message: seen.append(message) or (None, None)
    server = replace(SLICES.server, api_key_digests=("a1",), admin_key_digests=("b2",))
    cluster.launch(MANAGERS[0], slices=replace(SLICES, server=server))
    (message,) = seen
    assert message.assignment.slices.server == SLICES.server
    assert all(door.keys is None for door in message.assignment.doors.values())


def test_an_outpost_that_is_busy_for_long_does_not_take_that_for_silence(monkeypatch):
    """To look for CUDA devices, or to download a model, may take longer than the limit."""

    def look_slowly(*_: object) -> Machine:
        time.sleep(2.5)
        return Machine("here", 1, (), None)

    monkeypatch.setattr(outpost_module, "look_here", look_slowly)
    cluster = Cluster(silence_s=1)
    cluster.outposts.look(0, "cpu", "auto")
    cluster.outposts.seen(0)
    time.sleep(1)
    assert cluster.outposts.missing([0, 1]) == []
    cluster.launcher.close()
    for each in cluster.running:
        each.wait()
        assert each.error is None


def test_an_outpost_calls_again_if_the_supervisor_has_no_room_for_it(monkeypatch):
    monkeypatch.setattr(outposts_module, "_MAX_UNPROVED", 1)
    outposts = Outposts("127.0.0.1", SECRET)
    with socket.create_connection(outposts.address):  # says nothing, and is in the way
        time.sleep(0.5)
        running = RunningOutpost(outposts.address, 0)
        time.sleep(0.5)
        assert outposts.missing([0]) == [0]
    eventually(lambda: not outposts.missing([0]), "the outpost joins")
    outposts.close()
    running.wait()
    assert running.error is None


class _Broken:
    """A starter whose cluster is gone."""

    def start(self, index: int) -> None:
        raise RuntimeError("no cluster")

    def check(self, indices: object) -> None:
        pass


def test_a_replica_without_a_place_is_told_of_whatever_the_reason_is(cluster):
    cluster.launcher._starter = _Broken()
    cluster.outposts.missing = lambda indices: [1]
    problems: queue.SimpleQueue[LaunchError | None] = queue.SimpleQueue()
    cluster.launcher.prepare_again([MANAGERS[1]], problems.put)
    assert "RuntimeError: no cluster" in str(problems.get(timeout=10))


def test_a_launcher_closes_once():
    outposts = Outposts("127.0.0.1", SECRET)
    closed: list[int] = []
    launcher = RemoteLauncher(outposts, PLACES, on_close=lambda: closed.append(1))
    launcher.close()
    launcher.close()
    assert closed == [1]
