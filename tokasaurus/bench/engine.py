"""The processes of an engine whose device is simulated, behind real channels.

::

    SimulatedEngine     this process ──▶ manager ──▶ device      the caller plays the server
                              ▲            │  ▲        │
                              └────────────┘  └────────┘

    SimulatedService    HTTP ──▶ server ──▶ manager ──▶ device
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TypeVar

import msgspec

from tokasaurus.bench.cpu_time import process_cpu_s
from tokasaurus.bench.device_process import DevicePlan
from tokasaurus.config.slices import EngineSlices
from tokasaurus.errors import EngineDead
from tokasaurus.launch.doors import TO_MANAGER, TO_SERVER
from tokasaurus.launch.lifeline import Assignment, Failed, Joined, Lifeline, Ready, Start
from tokasaurus.planner.worker_loop import DeviceStatistics
from tokasaurus.protocol.channels import Receiver, Sender, door_address
from tokasaurus.protocol.messages import FromServer, ToServer, WorkerStall
from tokasaurus.protocol.role import Kind, Role

__all__ = ["SimulatedEngine", "SimulatedService"]

_END_S = 5.0
_READY_S = 60.0

P = TypeVar("P", bound="_Processes")


class _Processes:
    """The processes of a real manager and a simulated device. A context manager, which ends them.

    Args:
        slices: the configuration.
        plan: what the device simulates.
    """

    def __init__(self, slices: EngineSlices, plan: DevicePlan) -> None:
        self._slices = slices
        self._plan = plan
        self._directory = Path(tempfile.mkdtemp(prefix="tokasaurus-"))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._lifelines: dict[str, Lifeline] = {}

    def __enter__(self: P) -> P:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def pid(self, name: str) -> int:
        """The process id of one of the processes."""
        return self._processes[name].pid

    def cpu_s(self, name: str) -> float:
        """The CPU time of one of the processes."""
        return process_cpu_s(self.pid(name))

    def close(self) -> None:
        """Ends all processes."""
        for lifeline in self._lifelines.values():
            lifeline.close()
        deadline = time.monotonic() + _END_S
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _start(self, *, listener: socket.socket | None = None) -> None:
        """Starts all processes and waits until they are ready. Raises EngineDead if one fails."""
        self._spawn_role("manager")
        manager = self._slices.replicas[0].manager
        self._spawn(
            "device",
            "tokasaurus.bench.device_process",
            str(self._directory),
            str(manager.num_slots),
            str(manager.page_size),
            msgspec.json.encode(self._plan).decode(),
        )
        if listener is not None:
            self._spawn_servers(listener.fileno())
        for name in self._processes:
            self._await_ready(name)
        self._lifelines["manager"].send(Ready())  # the device's, which has the pages as planned
        self.device = DeviceStatistics(self._directory / DeviceStatistics.FILE_NAME, create=False)

    def _spawn_servers(self, listener_fd: int) -> None:
        """The server, which listens itself or has HTTP processes that do."""
        number = self._slices.server_processes
        if number == 1:
            self._spawn_role("server", listener_fd)
            return
        self._spawn_role("server")
        for each in range(1, number + 1):
            self._lifelines["server"].send(Joined(each))
            self._spawn_role("http", listener_fd, each)

    def _spawn_role(self, kind: Kind, listener_fd: int | None = None, number: int = 0) -> None:
        role = Role(kind, number)
        passed = () if listener_fd is None else (listener_fd,)
        self._spawn(str(role), "tokasaurus.launch.child", passed=passed)
        assignment = Assignment(role, str(self._directory), self._slices, listener_fd)
        self._lifelines[str(role)].send(assignment)

    def _spawn(self, name: str, module: str, *arguments: str, passed: tuple[int, ...] = ()) -> None:
        ours, theirs = Lifeline.pair()
        self._lifelines[name] = ours
        self._processes[name] = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno()), *arguments],
            pass_fds=[theirs.fileno(), *passed],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()

    def _await_ready(self, name: str) -> None:
        notes = self._lifelines[name].receive()
        if notes is None:
            raise EngineDead(f"the {name} did not start; see above")
        for note in notes:
            if isinstance(note, Failed):
                raise EngineDead(f"the {name} did not start: {note.summary}\n{note.traceback}")

    def _check_alive(self) -> None:
        """Raises EngineDead if a process has ended."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise EngineDead(f"the {name} ended: {self._reason(name)}")

    def _reason(self, name: str) -> str:
        """Why a process has ended."""
        notes = self._lifelines[name].receive() or []
        for note in notes:
            if isinstance(note, Failed):
                return f"{note.summary}\n{note.traceback}"
        return f"exit status {self._processes[name].returncode}"


class SimulatedEngine(_Processes):
    """Manager and device, and the messages that a server exchanges with them.

    Args:
        slices: the configuration.
        plan: what the device simulates.

    Raises:
        EngineDead: a process did not start.
    """

    def __init__(self, slices: EngineSlices, plan: DevicePlan) -> None:
        super().__init__(slices, plan)
        self._door = Receiver(door_address(self._directory, Role("server")), TO_SERVER)
        address = door_address(self._directory, Role("manager"))
        self._to_manager = Sender(address, TO_MANAGER)
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def send(self, message: FromServer) -> None:
        self._to_manager.send(message)

    def receive(self, timeout_s: float) -> list[ToServer]:
        """The messages of the manager, for the first of which it waits at most that long.

        Raises:
            EngineDead: a process has ended.
        """
        messages = self._door.receive(timeout_s)
        if not messages:
            self._check_alive()
        return [each for each in messages if not isinstance(each, WorkerStall)]

    def manager_cpu_s(self) -> float:
        """The CPU time of the manager's process."""
        return self.cpu_s("manager")

    def close(self) -> None:
        """Ends both processes."""
        super().close()
        self._door.close()
        self._to_manager.close()


class SimulatedService(_Processes):
    """Server, manager and device, which answer clients over HTTP.

    Args:
        slices: the configuration, with a real tokenizer.
        plan: what the device simulates.

    Attributes:
        port: the server's port on 127.0.0.1.

    Raises:
        EngineDead: a process did not start.
    """

    def __init__(self, slices: EngineSlices, plan: DevicePlan) -> None:
        super().__init__(slices, plan)
        # Files and batches lie beside the sockets, so that no other engine shares them.
        server = dataclasses.replace(slices.server, data_dir=str(self._directory / "data"))
        self._slices = dataclasses.replace(slices, server=server)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.port: int = self._listener.getsockname()[1]
        try:
            self._start(listener=self._listener)
        except BaseException:
            self.close()
            raise
        self._lifelines["server"].send(Start())
        self._await_health()

    def http_cpu_s(self) -> list[float]:
        """The CPU time of each HTTP process."""
        return [self.cpu_s(name) for name in self._processes if name.startswith("http-")]

    def _await_health(self) -> None:
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_READY_S)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            time.sleep(0.02)
        self.close()
        raise EngineDead("the server is not ready")

    def close(self) -> None:
        """Ends all processes."""
        super().close()
        self._listener.close()
