"""A real manager process and a simulated device's, behind real channels. Who owns one plays the server.

::

    this process ──▶ manager ──▶ device
          ▲            │  ▲        │
          └────────────┘  └────────┘
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from tokasaurus.bench.cpu_time import process_cpu_s
from tokasaurus.bench.device_process import DevicePlan
from tokasaurus.config.slices import EngineSlices
from tokasaurus.errors import EngineDead
from tokasaurus.launch.doors import TO_MANAGER, TO_SERVER
from tokasaurus.launch.lifeline import Assignment, Failed, Lifeline
from tokasaurus.planner.worker_loop import DeviceStatistics
from tokasaurus.protocol.channels import Receiver, Sender
from tokasaurus.protocol.messages import FromServer, ToServer

__all__ = ["SimulatedEngine"]

_END_S = 5.0


class SimulatedEngine:
    """Starts both processes; a context manager that ends them.

    Args:
        slices: the configuration.
        plan: of the device.

    Raises:
        EngineDead: a process did not get ready.
    """

    def __init__(self, slices: EngineSlices, plan: DevicePlan) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="tokasaurus-"))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._lifelines: dict[str, Lifeline] = {}
        self._door = Receiver(self._directory, "server", TO_SERVER)
        self._to_manager = Sender(self._directory, "manager", TO_MANAGER)
        try:
            self._spawn("manager", "tokasaurus.launch.child")
            self._lifelines["manager"].send(Assignment("manager", str(self._directory), slices))
            arguments = [str(self._directory), str(slices.manager.num_slots)]
            self._spawn(
                "device",
                "tokasaurus.bench.device_process",
                *arguments,
                msgspec.json.encode(plan).decode(),
            )
            for name in self._processes:
                self._await_ready(name)
        except BaseException:
            self.close()
            raise
        self.device = DeviceStatistics(self._directory / DeviceStatistics.FILE_NAME, create=False)

    def __enter__(self) -> SimulatedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, message: FromServer) -> None:
        self._to_manager.send(message)

    def receive(self, timeout_s: float) -> list[ToServer]:
        """What the manager has to say, within that time.

        Raises:
            EngineDead: a process has ended.
        """
        messages = self._door.receive(timeout_s)
        if not messages:
            for name, process in self._processes.items():
                if process.poll() is not None:
                    raise EngineDead(f"the {name} ended: {self._reason(name)}")
        return messages

    def manager_cpu_s(self) -> float:
        """CPU time of the manager's process."""
        return process_cpu_s(self._processes["manager"].pid)

    def close(self) -> None:
        """Ends both processes."""
        for lifeline in self._lifelines.values():
            lifeline.close()
        deadline = time.monotonic() + _END_S
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._door.close()
        self._to_manager.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _spawn(self, name: str, module: str, *arguments: str) -> None:
        ours, theirs = Lifeline.pair()
        self._lifelines[name] = ours
        self._processes[name] = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno()), *arguments],
            pass_fds=[theirs.fileno()],
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

    def _reason(self, name: str) -> str:
        """Why a process that has ended did so, as it said last."""
        notes = self._lifelines[name].receive() or []
        for note in notes:
            if isinstance(note, Failed):
                return f"{note.summary}\n{note.traceback}"
        return f"exit status {self._processes[name].returncode}"
