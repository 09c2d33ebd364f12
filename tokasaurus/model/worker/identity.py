"""What a worker is, for receipts: its model, flags, kernels and machine.

Owns the decision which flags change results, and which parts of a machine do.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tokasaurus.config.slices import WorkerConfig
from tokasaurus.model.backend.cpu.build import LoadedLibrary, loaded_libraries
from tokasaurus.model.config import ModelConfig
from tokasaurus.model.instruction_sets import processor_features, processor_name
from tokasaurus.model.weights.weight_files import WeightFiles
from tokasaurus.protocol.identity import WeightFile, WorkerIdentity

__all__ = ["make_identity"]

_WITHOUT_EFFECT = frozenset(
    {
        "rank",
        "pp_size",  # stages compute what one worker does
        "device_index",
        "async_tp_threshold",  # where products overlap, there are no receipts
        "model_path",  # the digests of the model stand for it
        "trust_remote_code",
        "deterministic",  # without it there are no receipts
        "cudagraph_sizes",  # on cuda there are no receipts
        "cudagraph_max_tokens",
        "use_groups",
        "page_size",
        "num_pages",
        "least_pages",
        "most_pages",
        "num_slots",
        "max_seqs_per_forward",
        "max_tokens_per_forward",
        "max_request_tokens",
        "max_topk_logprobs",
        "num_threads",  # the environment has it
    }
)
"""Fields of the worker's slice on which no result depends. All others are in receipts."""

_KERNELS_OF_ATTENTION = {
    "compiled": ("operators", "paged_attention", "sampling"),
}
_KERNELS_OF_LINEAR = {"packed": ("packed",)}
_KERNELS_OF_QUANTIZATION = {"int8": ("int8",)}
_KERNELS_OF_RANKS = ("shared_memory",)
"""The libraries that a worker computes with. Others in the process may have loaded more."""

_LIBRARIES = ("torch", "numpy", "tokenizers", "llguidance")
"""Their versions may change a result: those of tables, texts and grammars."""


def make_identity(
    config: WorkerConfig,
    model: ModelConfig,
    files: WeightFiles | None,
    *,
    attention: str,
    linear: str,
    is_deterministic: bool,
    determinism_reason: str,
) -> WorkerIdentity:
    """Describes a worker.

    Args:
        config: its slice.
        model: its configuration.
        files: that its weights came from; None if they are random.
        attention: the name of its backend.
        linear: the name of its linear method.
        is_deterministic: whether its results do not depend on what runs beside a request.
        determinism_reason: why, in a line for users.
    """
    libraries = loaded_libraries(config.instruction_set)
    used = (
        *_KERNELS_OF_ATTENTION.get(attention, ()),
        *_KERNELS_OF_LINEAR.get(linear, ()),
        *_KERNELS_OF_QUANTIZATION.get(config.quantization or "", ()),
        *(_KERNELS_OF_RANKS if config.tp_size > 1 else ()),
    )
    kernels = {name: libraries[name] for name in used if name in libraries}
    return WorkerIdentity(
        is_deterministic=is_deterministic,
        determinism_reason=determinism_reason,
        model=_model(model),
        configuration=_configuration(config, kernels, attention, linear),
        kernels={
            name: {"source": each.source, "flags": each.flags} for name, each in kernels.items()
        },
        environment={
            "determinism": determinism_reason,
            "source": _source_digest(),
            "architecture": platform.machine(),
            "processor": processor_name(),
            "processor_features": sorted(processor_features()),
            "torch_instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "compiler": ", ".join(sorted({each.compiler for each in kernels.values()})),
            "libraries": {name: _version(name) for name in _LIBRARIES},
        },
        weight_files=() if files is None else tuple(_stamped_files(files)),
    )


def _model(config: ModelConfig) -> dict[str, Any]:
    rope = {"kind": type(config.rope).__name__, **dataclasses.asdict(config.rope)}
    return {**dataclasses.asdict(config), "rope": rope}


def _configuration(
    config: WorkerConfig, kernels: dict[str, LoadedLibrary], attention: str, linear: str
) -> dict[str, Any]:
    flags = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in _WITHOUT_EFFECT
    }
    flags.update(attention=attention, linear=linear)
    if kernels:
        sets = sorted({each.instruction_set for each in kernels.values()})
        flags["instruction_set"] = ", ".join(sets)
    for name in ("rope_scaling", "torch_compile_config"):
        if flags[name] is not None:
            flags[name] = json.loads(flags[name])
    return flags


def _stamped_files(files: WeightFiles) -> list[WeightFile]:
    return [
        WeightFile(str(path.absolute()), stamp.num_bytes, stamp.modified_ns)
        for path, stamp in files.stamps()
    ]


def _source_digest() -> str:
    """SHA-256 of the Python of this room, which a version alone does not tell in a checkout."""
    room = Path(__file__).parents[1]
    whole = hashlib.sha256()
    for path in sorted(room.rglob("*.py")):
        whole.update(str(path.relative_to(room)).encode() + b"\0" + path.read_bytes() + b"\0")
    return whole.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
