"""The machine at hand as a device of the planner: measured rates, and its memory."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import msgspec

from tokasaurus.config.engine import EngineConfig
from tokasaurus.errors import LaunchError
from tokasaurus.launch.machine import Devices, devices_here
from tokasaurus.launch.processor import num_cores
from tokasaurus.model.instruction_sets import processor_name
from tokasaurus.planner.devices import Device, Figure
from tokasaurus.tuning.trial_process import environment

__all__ = ["Here", "look_here"]

_HOW = "toka-bench roofline"


class _Rates(msgspec.Struct):
    """What the benchmark prints."""

    matrix_gflop_per_s: dict[str, float]
    memory_gb_per_s: float


@dataclass(frozen=True)
class Here:
    """What there is.

    Attributes:
        device: each CUDA device, or the whole machine.
        num_devices: CUDA devices; 1 without any.
        num_cores: that this process may use.
    """

    device: Device
    num_devices: int
    num_cores: int

    @property
    def line(self) -> str:
        """For people and for files."""
        memory = f"{self.device.memory_bytes / 1e9:.1f} GB free"
        if self.device.kind == "cpu":
            return f"{self.device.name}, {self.num_cores} cores, {memory}"
        return f"{self.num_devices} x {self.device.name}, {memory}"


def look_here(config: EngineConfig) -> Here:
    """Looks at the machine, and measures how fast it multiplies and reads.

    Raises:
        ConfigError: the processor does not run the instruction set that was asked for.
        LaunchError: the measurement failed.
    """
    devices = devices_here(config)
    kind: Literal["cuda", "cpu"] = "cuda" if devices.num_cuda_devices else "cpu"
    rates = _measure(kind, _dtypes(kind, devices))
    figures = {
        "memory_gb": Figure(value=devices.memory_bytes / 1e9, measured="free here"),
        "read_gb_per_s": Figure(value=rates.memory_gb_per_s, measured=_HOW),
    }
    for dtype, rate in rates.matrix_gflop_per_s.items():
        figures[f"tflop_per_s.{dtype}"] = Figure(value=rate / 1e3, measured=_HOW)
    if kind == "cuda":  # nothing measures links here
        figures["link_gb_per_s"] = Figure(value=25, estimate="PCIe")
        figures["link_us"] = Figure(value=30, estimate="a small all-reduce of NCCL over PCIe")
    return Here(
        device=Device("here", _name(kind), kind, figures),
        num_devices=max(devices.num_cuda_devices, 1),
        num_cores=num_cores(),
    )


def _dtypes(kind: str, devices: Devices) -> str:
    if kind == "cpu" and devices.bfloat16_instructions is None:
        return "float32"
    return "float32,bfloat16"


def _name(kind: str) -> str:
    if kind == "cpu":
        return processor_name()
    question = "import torch; print(torch.cuda.get_device_name())"
    asked = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True)
    return asked.stdout.strip()


def _measure(kind: str, dtypes: str) -> _Rates:
    """Runs the benchmark in a process of its own, which takes its memory with it."""
    words = [f"dtypes={dtypes}", f"device={kind}", "rounds=3"]
    command = [sys.executable, "-m", "tokasaurus.bench.main", "roofline", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise LaunchError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=_Rates)
