"""Cartridges of random numbers in every layout, and archives as torch.save writes them."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tokasaurus.cartridges.job import Job, Report
from tokasaurus.cartridges.reader.process import examine
from tokasaurus.cartridges.reading import ReadLimits

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 2, 2, 4
_LIMITS = ReadLimits()


def tensors(num_tokens: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[Tensor]:
    """One for each layer, [1, kv_heads, tokens, head_dim]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, NUM_HEADS, num_tokens, HEAD_DIM)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(NUM_LAYERS)]


def fields(
    num_frozen: int = 1,
    num_trainable: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    name: str = "frozen",
) -> dict[str, list[Tensor]]:
    """A cartridge as trainers save it, with plain lists."""
    return {
        "trainable_keys": tensors(num_trainable, dtype, 1),
        "trainable_values": tensors(num_trainable, dtype, 2),
        f"{name}_keys": tensors(num_frozen, dtype, 3),
        f"{name}_values": tensors(num_frozen, dtype, 4),
    }


def changed(**changes: Any) -> dict[str, Any]:
    """A cartridge with other fields."""
    return {**fields(), **changes}


def with_number(value: float, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """A cartridge with this number at position 3 of the values of layer 1."""
    made = fields(dtype=dtype)
    made["trainable_values"][1][0, 1, 2, 3] = value
    return made


def own_tensors(num_tokens: int = 5, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """A cartridge with the names and shapes of our safetensors files."""
    return {
        f"{kind}.{layer}": tensor[0].transpose(0, 1).contiguous()
        for seed, kind in enumerate(("keys", "values"))
        for layer, tensor in enumerate(tensors(num_tokens, dtype, seed))
    }


def write_own(path: Path, metadata: dict[str, str] | None = None, **tensors: Tensor) -> None:
    """Writes a safetensors file; ``keys_0`` stands for ``keys.0``."""
    named = {name.replace("_", "."): tensor for name, tensor in tensors.items()}
    save_file({**own_tensors(), **named}, path, metadata)


def write_archive(
    path: Path,
    program: bytes | None = None,
    *,
    compression: int = zipfile.ZIP_STORED,
    entries: tuple[tuple[str, bytes], ...] = (),
) -> None:
    """An archive like those of torch.save, with any pickle.

    Args:
        program: the pickle; None for one of a cartridge without tensors.
        compression: of all entries.
        entries: further ones.
    """
    if program is None:
        program = pickle.dumps({"trainable_keys": [], "trainable_values": []}, 2)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/version", b"3\n")
        for name, data in entries:
            archive.writestr(name, data)


def edit_archive(path: Path, entry: str, data: bytes) -> None:
    """Replaces an entry of an archive."""
    with zipfile.ZipFile(path) as archive:
        contents = {each.filename: archive.read(each) for each in archive.infolist()}
    (name,) = [each for each in contents if each.endswith(f"/{entry}")]
    contents[name] = data
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for each, its in contents.items():
            archive.writestr(each, its)


def saved(value: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Calls:
    """Becomes a call of a function when it is unpickled by a careless program."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._call


def read_here(
    source: Path,
    target: Path | None = None,
    companion: Path | None = None,
    limits: ReadLimits = _LIMITS,
) -> Report:
    """What the process that reads would do and answer, in this one and without its limits.

    To start a process that imports torch takes seconds.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(each, "rb")) for each in (source, companion) if each]
        made = None if target is None else stack.enter_context(open(target, "wb"))
        job = Job(
            source=files[0].fileno(),
            companion=None if companion is None else files[1].fileno(),
            target=None if made is None else os.dup(made.fileno()),
            max_tokens=limits.max_tokens,
            max_bytes=limits.max_bytes,
            memory_bytes=limits.memory_bytes,
            timeout_s=limits.timeout_s,
        )
        try:
            return examine(job, lambda job: None)
        finally:
            if job.target is not None:
                os.close(job.target)
