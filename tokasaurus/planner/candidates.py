"""Configurations that a plan chooses from: which fit a device, and what each leaves for KV.

Fitting is decided by ``config.resolve``, the same function that decides at an engine's start, with
the memory of the device's data sheet in the place of what is free on a machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.resolve import resolve
from tokasaurus.config.slices import EngineSlices, ManagerConfig, ModelFacts
from tokasaurus.errors import ConfigError
from tokasaurus.planner.cost_model import CostModel
from tokasaurus.planner.devices import Device

__all__ = ["Candidate", "Layout", "Question", "candidate", "fitting", "layouts"]

_MOST_DEVICES = 1024  # that are tried for a model that fits nowhere


@dataclass(frozen=True, order=True)
class Layout:
    """How devices are dealt: replicas, workers that share each layer, stages."""

    dp_size: int
    tp_size: int
    pp_size: int

    @property
    def num_devices(self) -> int:
        return self.dp_size * self.tp_size * self.pp_size

    def __str__(self) -> str:
        sizes = {"dp": self.dp_size, "tp": self.tp_size, "pp": self.pp_size}
        return (
            " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "1 device"
        )


@dataclass(frozen=True)
class Question:
    """What is to be planned, apart from the demand.

    Attributes:
        facts: of the model.
        device: each of them.
        num_devices: that there are.
        flags: of the engine that are decided already, by name.
        sizes: of the layout that are decided already, by name.
        cost: of a batch, if it was measured; for one device only.
    """

    facts: ModelFacts
    device: Device
    num_devices: int
    flags: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    cost: CostModel | None = None


@dataclass(frozen=True)
class Candidate:
    """A configuration that fits.

    Attributes:
        layout: of the devices.
        flags: of the engine, by name, without the layout's.
        slices: what they resolve to.
    """

    layout: Layout
    flags: Mapping[str, Any]
    slices: EngineSlices

    @property
    def manager(self) -> ManagerConfig:
        """Of each replica."""
        return self.slices.replicas[0].manager

    @property
    def dtype(self) -> str:
        """Of weights, activations and KV cache."""
        return self.slices.replicas[0].workers[0].dtype

    @property
    def kv_tokens(self) -> int:
        """Tokens of a replica's KV cache."""
        return self.manager.num_pages * self.manager.page_size

    @property
    def words(self) -> list[str]:
        """The flags as words of a command line, without those of a layout of one."""
        sizes = dataclasses.asdict(self.layout)
        words = [f"{name}={size}" for name, size in sizes.items() if size > 1]
        flags = {name: value for name, value in self.flags.items() if value is not None}
        return words + [f"{name}={value}" for name, value in flags.items()]


def candidate(question: Question, layout: Layout, **flags: Any) -> Candidate:
    """Resolves a configuration.

    Raises:
        ConfigError: it does not fit, or its flags contradict one another; a line for each reason.
    """
    device = question.device
    chosen = {"kv_cache_num_tokens": "auto", **flags, **question.flags}
    config = EngineConfig.from_flags(
        model=question.facts.path, device=device.kind, **dataclasses.asdict(layout), **chosen
    )
    slices = resolve(
        config,
        question.facts,
        num_cuda_devices=question.num_devices if device.kind == "cuda" else 0,
        memory_bytes=device.memory_bytes,
        bfloat16_instructions="bfloat16" if "bfloat16" in device.dtypes else None,
    )
    return Candidate(layout, chosen, slices)


def layouts(question: Question) -> list[Layout]:
    """All ways to deal the devices so that none is left over, within the sizes that are decided.

    Devices whose links are unknown only make replicas.
    """
    count = question.num_devices
    found = []
    for tp_size, pp_size in itertools.product(_divisors(count), repeat=2):
        if count % (tp_size * pp_size) == 0:
            layout = Layout(count // (tp_size * pp_size), tp_size, pp_size)
            if layout.dp_size < count and not question.device.can_be_joined:
                continue
            decided = question.sizes
            if all(getattr(layout, name) == size for name, size in decided.items()):
                found.append(layout)
    return found


def fitting(question: Question) -> dict[Layout, Candidate]:
    """The layouts that hold the model, each with limits that adapt and all the KV that fits.

    Raises:
        ConfigError: there is none. The message has the arithmetic of the layout that comes nearest,
            and says how many devices would do.
    """
    found: dict[Layout, Candidate] = {}
    reasons: dict[Layout, str] = {}
    for layout in layouts(question):
        try:
            found[layout] = candidate(question, layout)
        except ConfigError as error:
            reasons[layout] = str(error)
    if found:
        return found
    name, count = question.device.name, question.num_devices
    if not reasons:
        sizes = ", ".join(f"{key}={size}" for key, size in question.sizes.items())
        reason = "" if question.device.can_be_joined else ": the links of the device are unknown"
        raise ConfigError(f"gpus={count} cannot be dealt with {sizes}; change one of them{reason}")
    # The fewer replicas there are, the smaller is each device's part of the model.
    nearest = min(reasons, key=lambda layout: (layout.dp_size, layout.pp_size))
    raise ConfigError(
        f"no way to use {count} x {name} holds this:\n{nearest}: {reasons[nearest]}\n"
        f"{_more_devices(question)}"
    )


def _more_devices(question: Question) -> str:
    """How many devices would do, in a sentence."""
    count = question.num_devices
    while question.device.can_be_joined and (count := 2 * count) <= _MOST_DEVICES:
        larger = dataclasses.replace(question, num_devices=count, sizes={})
        for layout in layouts(larger):
            with contextlib.suppress(ConfigError):
                candidate(larger, layout)
                return f"gpus={count} would do, with {layout}"
    return "more devices would not help; take a device with more memory, or another dtype"


def _divisors(count: int) -> list[int]:
    return [each for each in range(1, count + 1) if count % each == 0]
