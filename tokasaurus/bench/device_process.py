"""The main program of a simulated device's process.

python -m tokasaurus.bench.device_process FD DIRECTORY SLOTS PAGE_SIZE PLAN
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from pathlib import Path

import msgspec
import numpy as np

from tokasaurus.launch.doors import TO_MANAGER, TO_WORKER
from tokasaurus.launch.lifeline import Lifeline, Ready
from tokasaurus.planner.lengths import DrawnLengths
from tokasaurus.planner.named_costs import cost_model
from tokasaurus.planner.pipeline import SimulatedPipeline, Stages
from tokasaurus.planner.simulated_device import VOCAB_SIZE, SimulatedDevice
from tokasaurus.planner.worker_loop import DeviceStatistics, work
from tokasaurus.protocol.channels import Receiver, Sender, door_address
from tokasaurus.protocol.role import Role

__all__ = ["DevicePlan", "main"]

_ENDLESS = 1 << 40  # tokens: the manager's max_tokens ends every sequence


class DevicePlan(msgspec.Struct, frozen=True):
    """What to simulate."""

    cost: str  # the name of a cost model
    output_tokens: tuple[int, ...] = (_ENDLESS,)  # each sequence gets one of these lengths
    vocab_size: int = VOCAB_SIZE
    pp_size: int = 1  # equal stages


def main() -> None:
    """Runs batches until the lifeline is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lifeline = Lifeline(socket.socket(fileno=int(sys.argv[1])))
    directory, num_slots, page_size = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    plan = msgspec.json.decode(sys.argv[5], type=DevicePlan)
    threading.Thread(target=_await_end, args=(lifeline,), daemon=True).start()
    lengths = DrawnLengths(np.array(plan.output_tokens, np.int64))
    device = SimulatedPipeline(
        SimulatedDevice(cost_model(plan.cost), lengths, num_slots, page_size, plan.vocab_size),
        Stages.equal(plan.pp_size),
        num_slots,
    )
    statistics = DeviceStatistics(directory / DeviceStatistics.FILE_NAME, create=True)
    door = Receiver(door_address(directory, Role("worker")), TO_WORKER)
    to_manager = Sender(door_address(directory, Role("manager")), TO_MANAGER)
    lifeline.send(Ready())
    work(door, to_manager, device, statistics)


def _await_end(lifeline: Lifeline) -> None:
    while lifeline.receive() is not None:
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
