"""Turns the user's choices into the rooms' slices: finds the model and looks at the machine."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.resolve import resolve
from tokasaurus.config.slices import EngineSlices
from tokasaurus.errors import ConfigError, ModelError
from tokasaurus.launch.model_files import find_model, find_model_here, find_tokenizer
from tokasaurus.model.facts import model_facts
from tokasaurus.model.instruction_sets import bfloat16_instructions

__all__ = ["assemble", "explain"]

_QUESTION = """
import torch
if torch.cuda.is_available():
    print(*(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())))
"""


def assemble(config: EngineConfig) -> EngineSlices:
    """Resolves a configuration on this machine.

    Downloads the model if it is named by a repository id and is not in the cache.

    Raises:
        ConfigError: flags contradict one another, the model or the machine.
        ModelError: the model cannot be found, or its architecture is unknown.
    """
    return _resolve(config, find_model(config.model))


def explain(config: EngineConfig) -> list[str]:
    """What resolution decides about the model, for ``--show``. Downloads nothing."""
    model = find_model_here(config.model)
    if model is None:
        return [f"model={config.model} is not here yet; it decides dtype and memory"]
    try:
        slices = _resolve(config, model)
    except (ConfigError, ModelError) as error:
        return [f"error: {line}" for line in str(error).splitlines()]
    return [slices.dtype_plan, slices.memory_plan, slices.determinism_plan]


def _resolve(config: EngineConfig, model: Path) -> EngineSlices:
    rope_scaling = None if config.rope_scaling is None else json.dumps(dict(config.rope_scaling))
    if config.tokenizer is not None:
        config = dataclasses.replace(config, tokenizer=str(find_tokenizer(config.tokenizer)))
    facts = model_facts(model, rope_scaling, config.load_format, config.tokenizer)
    cuda_bytes = [] if config.device == "cpu" else _free_cuda_bytes()
    used = cuda_bytes[: config.dp_size * config.pp_size * config.tp_size]
    return resolve(
        config,
        facts,
        memory_bytes=min(used) if used else _available_memory_bytes(),
        num_cuda_devices=len(cuda_bytes),
        bfloat16_instructions=(
            None if cuda_bytes else bfloat16_instructions(config.instruction_set)
        ),
    )


def _available_memory_bytes() -> int:
    """Memory available without swapping, as Linux estimates it; elsewhere, half of all memory."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


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
