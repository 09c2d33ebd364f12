"""The loop of the manager's process: for how long it waits, and what it says meanwhile."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest

from tokasaurus.bench.device_process import DevicePlan
from tokasaurus.bench.engine import SimulatedEngine
from tokasaurus.config.engine import EngineConfig
from tokasaurus.launch.doors import TO_MANAGER, TO_SERVER
from tokasaurus.launch.lifeline import Assignment, Failed, Lifeline, Ready
from tokasaurus.planner.configuration import simulated_slices
from tokasaurus.protocol.channels import Receiver, Sender, door_address
from tokasaurus.protocol.commands import (
    Command,
    CommandDone,
    Pause,
    PauseMode,
    Resume,
    UpdateWeights,
)
from tokasaurus.protocol.messages import (
    GenerateRequest,
    Sampling,
    SequenceUpdates,
    Statistics,
)
from tokasaurus.protocol.role import Role
from tokasaurus.protocol.watching import Outlook, Watch

pytestmark = [pytest.mark.engine, pytest.mark.processes]

SLICES = simulated_slices(EngineConfig(kv_cache_num_tokens=8192, log_level="WARNING"))

# A process of the manager that gives its worker a third of a second for an update.
IMPATIENT = """
import sys
from tokasaurus.launch import child
from tokasaurus.manager import controls
from tokasaurus.protocol.commands import UpdateWeights
controls.TIME_LIMITS_S[UpdateWeights] = 0.3
sys.exit(child.main())
"""


def received_until(engine: SimulatedEngine, kind: type, count: int = 1) -> list:
    messages = []
    deadline = time.monotonic() + 60
    while sum(isinstance(message, kind) for message in messages) < count:
        assert time.monotonic() < deadline, messages
        messages += engine.receive(1.0)
    return messages


def test_a_paused_manager_rests_though_a_request_waits() -> None:
    request = GenerateRequest(7, np.arange(1, 9, dtype=np.int32), 1, 3, Sampling(), 5, ())
    with SimulatedEngine(SLICES, DevicePlan("instant", (3,))) as engine:
        engine.send(Command(1, Pause(PauseMode.KEEP)))
        received_until(engine, CommandDone)
        engine.send(request)
        messages = []
        while not messages or not messages[-1].num_waiting:
            messages = [m for m in received_until(engine, Statistics) if isinstance(m, Statistics)]
        assert messages[-1].paused
        assert messages[-1].num_waiting == 1
        cpu_s = engine.manager_cpu_s()
        assert engine.receive(2.0) == []
        assert engine.manager_cpu_s() - cpu_s < 0.5
        engine.send(Command(2, Resume()))
        received_until(engine, SequenceUpdates)


def test_a_manager_sends_outlooks_while_it_is_watched() -> None:
    request = GenerateRequest(7, np.arange(1, 9, dtype=np.int32), 1, 3000, Sampling(), 5, ())
    with SimulatedEngine(SLICES, DevicePlan("fixed:0.01", (3000,))) as engine:
        engine.send(request)
        messages = received_until(engine, Statistics)
        assert not any(isinstance(message, Outlook) for message in messages)
        engine.send(Watch(0.5))
        received_until(engine, Outlook)
        received_until(engine, Statistics, 2)  # the time is over by then
        messages = received_until(engine, Statistics)
        assert not any(isinstance(message, Outlook) for message in messages)


def test_a_manager_has_the_pages_that_its_worker_says():
    """What comes before the worker is ready waits."""
    ours, theirs = Lifeline.pair()
    with tempfile.TemporaryDirectory() as directory:
        process = subprocess.Popen(
            [sys.executable, "-m", "tokasaurus.launch.child", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
        )
        door = Receiver(door_address(directory, Role("server")), TO_SERVER)
        sender = Sender(door_address(directory, Role("manager")), TO_MANAGER)
        try:
            theirs.close()
            ours.send(Assignment(Role("manager"), directory, SLICES, None))
            assert ours.receive() == [Ready()]
            sender.send(Command(1, Pause(PauseMode.KEEP)))
            assert door.receive(0.3) == []
            ours.send(Ready(num_pages=77))
            messages = []
            while not any(isinstance(message, Statistics) for message in messages):
                arrived = door.receive(60)
                assert arrived, messages
                messages += arrived
            (statistics, *_) = (each for each in messages if isinstance(each, Statistics))
            assert statistics.num_pages == 77 != SLICES.replicas[0].manager.num_pages
        finally:
            process.kill()
            process.wait()
            for each in (ours, door, sender):
                each.close()


def test_a_manager_whose_worker_hangs_ends_with_the_reason() -> None:
    ours, theirs = Lifeline.pair()
    with tempfile.TemporaryDirectory() as directory:
        process = subprocess.Popen(
            [sys.executable, "-c", IMPATIENT, str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
        try:
            theirs.close()
            ours.send(Assignment(Role("manager"), directory, SLICES, None))
            assert ours.receive() == [Ready()]
            ours.send(Ready())  # the worker's
            sender = Sender(door_address(directory, Role("manager")), TO_MANAGER)
            sender.send(Command(1, UpdateWeights(1, ("a.safetensors",))))
            (failed,) = ours.receive() or [None]
            assert isinstance(failed, Failed)
            assert "has not finished UpdateWeights (control 0) within its limit" in failed.summary
            assert process.wait(60) == 1
            sender.close()
        finally:
            process.kill()
            process.wait()
            ours.close()
