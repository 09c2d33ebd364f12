"""What resolution has to know about the machine that workers run on."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tokasaurus.config.engine import EngineConfig
from tokasaurus.errors import ConfigError
from tokasaurus.launch.available_memory import available_memory_bytes
from tokasaurus.model.instruction_sets import bfloat16_instructions

__all__ = ["Devices", "Machine", "devices_here", "devices_of", "look_here"]

_QUESTION = """
import torch
if torch.cuda.is_available():
    print(*(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())))
"""


class Machine(msgspec.Struct, frozen=True):
    """One machine, as a program on it sees it."""

    name: str
    memory_bytes: int  # available without swapping
    cuda_bytes: tuple[int, ...]  # free memory of each visible CUDA device that works
    bfloat16_instructions: str | None  # the instruction set of the kernels, if it multiplies bf16


@dataclass(frozen=True)
class Devices:
    """What the workers of an engine have: the arguments of ``resolve``."""

    num_cuda_devices: int
    # Free memory of the device with the least, or of all replicas together on the CPU.
    memory_bytes: int
    bfloat16_instructions: str | None


def devices_here(config: EngineConfig) -> Devices:
    """The devices of this machine.

    Raises:
        ConfigError: see :func:`look_here`.
    """
    machine = look_here(config.device, config.instruction_set)
    used = machine.cuda_bytes[: config.dp_size * config.pp_size * config.tp_size]
    return Devices(
        num_cuda_devices=len(machine.cuda_bytes),
        memory_bytes=min(used) if used else machine.memory_bytes,
        bfloat16_instructions=machine.bfloat16_instructions,
    )


def devices_of(config: EngineConfig, places: Sequence[tuple[Machine, int]]) -> Devices:
    """The devices of workers that have places already.

    Args:
        config: the user's choices.
        places: for each worker its machine, and the number of its CUDA device there if it has one.

    Raises:
        ConfigError: a machine has too few CUDA devices, or only some machines have any.
    """
    with_cuda = {machine.name: bool(machine.cuda_bytes) for machine, _ in places}
    if any(with_cuda.values()) or config.device == "cuda":
        for machine, device in places:
            if device >= len(machine.cuda_bytes):
                raise ConfigError(
                    f"device={config.device}: PyTorch finds {len(machine.cuda_bytes)} CUDA devices"
                    f" on {machine.name}, and a worker there needs number {device}; set device=cpu,"
                    " or start fewer workers there"
                )
        free = min(machine.cuda_bytes[device] for machine, device in places)
        return Devices(len(places), free, None)
    num_workers = Counter(machine.name for machine, _ in places)
    share = min(machine.memory_bytes // num_workers[machine.name] for machine, _ in places)
    sets = [machine.bfloat16_instructions for machine, _ in places]
    return Devices(
        num_cuda_devices=0,
        memory_bytes=share * len(places),
        bfloat16_instructions=sets[0] if all(sets) else None,
    )


def look_here(device: str, instruction_set: str) -> Machine:
    """Looks at this machine.

    Args:
        device: "auto", "cpu" or "cuda"; with "cpu", CUDA devices are not looked for.
        instruction_set: of the kernels on the CPU, or "auto".

    Raises:
        ConfigError: the processor does not run the instruction set.
    """
    cuda_bytes = () if device == "cpu" else tuple(_free_cuda_bytes())
    instructions = None if cuda_bytes else bfloat16_instructions(instruction_set)
    return Machine(socket.gethostname(), available_memory_bytes(), cuda_bytes, instructions)


def _free_cuda_bytes() -> list[int]:
    """Free memory of each visible CUDA device that works, in torch's order.

    CUDA reads ``CUDA_VISIBLE_DEVICES`` (numbers or UUIDs; empty for none), so the first of them has
    the index 0. Asks torch in a process of its own, which the CUDA contexts end with, and only if
    the driver is there: the import is slow.
    """
    if not (Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()):
        return []
    asked = subprocess.run([sys.executable, "-c", _QUESTION], stdout=subprocess.PIPE, text=True)
    words = asked.stdout.split()
    return [int(word) for word in words] if asked.returncode == 0 else []
