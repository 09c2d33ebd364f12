"""Turns the user's choices into the rooms' slices: finds the model and looks at the machine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.resolve import resolve
from tokasaurus.config.slices import EngineSlices
from tokasaurus.errors import ConfigError
from tokasaurus.launch.machine import Devices, devices_here
from tokasaurus.launch.memory_table import memory_table
from tokasaurus.launch.model_files import find_model, find_model_here, find_tokenizer
from tokasaurus.launch.tracing import check_tracing
from tokasaurus.model.facts import model_facts

__all__ = ["assemble", "explain", "show_memory"]


def assemble(config: EngineConfig, devices: Devices | None = None) -> EngineSlices:
    """Resolves a configuration.

    Downloads the model if it is named by a repository id and is not in the cache.

    Args:
        config: the user's choices.
        devices: that the workers will have; None looks at this machine.

    Raises:
        ConfigError: flags contradict one another, the model or the machine.
        ModelError: the model cannot be found, or its architecture is unknown.
    """
    check_tracing(config)
    return _resolve(config, find_model(config.model), devices)


def explain(config: EngineConfig) -> list[str]:
    """What resolution decides about the model, for ``--show``. Downloads nothing.

    Raises:
        ConfigError: flags contradict one another, the model or the machine.
        ModelError: the model's architecture is unknown.
    """
    model = find_model_here(config.model)
    if model is None:
        return [f"model={config.model} is not here yet; it decides dtype and memory"]
    slices = _resolve_for_question(config, model)
    plans = [slices.dtype_plan, slices.memory_plan.line, slices.determinism_plan]
    return [*plans, *slices.idle_flags]


def show_memory(config: EngineConfig) -> str:
    """What takes how much memory, as a table, for ``--show-memory``. Loads and downloads nothing.

    Raises:
        ConfigError: the model is not here. Or flags contradict one another, the model or the
            machine, which includes that they do not fit.
        ModelError: the model's architecture is unknown.
    """
    model = find_model_here(config.model)
    if model is None:
        raise ConfigError(
            f"model={config.model} is not here yet, and its size decides; download it first"
        )
    return memory_table(_resolve_for_question(config, model).memory_plan)


def _resolve_for_question(config: EngineConfig, model: Path) -> EngineSlices:
    """As the workers will find it: they refuse attention that their device cannot run."""
    slices = _resolve(config, model)
    if config.attention != "auto":
        # The import of torch is slow, and an engine's first process does without.
        import torch

        from tokasaurus.model.backend import backend_named

        backend_named(config.attention, torch.device(slices.memory_plan.device))
    return slices


def _resolve(config: EngineConfig, model: Path, devices: Devices | None = None) -> EngineSlices:
    rope_scaling = None if config.rope_scaling is None else json.dumps(dict(config.rope_scaling))
    if config.tokenizer is not None:
        config = dataclasses.replace(config, tokenizer=str(find_tokenizer(config.tokenizer)))
    facts = model_facts(model, rope_scaling, config.load_format, config.tokenizer)
    if devices is None:
        devices = devices_here(config)
    return resolve(
        config,
        facts,
        memory_bytes=devices.memory_bytes,
        num_cuda_devices=devices.num_cuda_devices,
        bfloat16_instructions=devices.bfloat16_instructions,
    )
