"""Cartridges in the safetensors format, as ``cartridge_file`` describes them. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tokasaurus.cartridge_file import CartridgeFile, key_name, value_name
from tokasaurus.cartridges.contents import Contents, Piece, Refusal, quoted
from tokasaurus.cartridges.writing import FORMAT
from tokasaurus.errors import ModelError
from tokasaurus.safetensors_file import TensorEntry

__all__ = ["read_own_file"]

_MAX_LAYERS = 4096
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_NAME_LENGTH = 512
_NAMED_LAYER = re.compile(r"(?:keys|values)\.\d+")


def read_own_file(descriptor: int) -> Contents:
    """Reads a safetensors file, whose tensors are mapped, not copied.

    Raises:
        Refusal: it is no cartridge.
    """
    path = Path(f"/dev/fd/{descriptor}")
    try:
        with CartridgeFile(path) as file:
            return _contents(file)
    except ModelError as error:
        raise Refusal(str(error).replace(str(path), "the file")) from None


def _contents(file: CartridgeFile) -> Contents:
    first = file.tensors.get(key_name(0))
    num_layers = sum(name.startswith("keys.") for name in file.tensors)
    if file.num_tokens and (first is None or len(first.shape) != 3):
        raise Refusal(
            f"tensor {key_name(0)} has shape {list(first.shape) if first else []}; it should have "
            "[tokens, kv_heads, head_dim]"
        )
    if num_layers > _MAX_LAYERS:
        raise Refusal(f"the file has {num_layers} layers; the limit is {_MAX_LAYERS}")
    assert first is not None
    _, num_kv_heads, head_dim = first.shape
    unnamed = sorted(name for name in file.tensors if not _NAMED_LAYER.fullmatch(name))
    if unnamed:
        raise Refusal(
            f"the file has the tensor {quoted(unnamed[0])}, which a cartridge has not: it has "
            f"{key_name(0)}, {value_name(0)} and so on"
        )
    file.check(num_layers, num_kv_heads, head_dim)
    buffer = memoryview(file.buffer())

    def piece(name: str) -> Piece:
        return _piece(buffer, file.tensors[name])

    said = _metadata(file.metadata, file.num_tokens)
    return Contents(
        layout="safetensors",
        layers=[([piece(key_name(i))], [piece(value_name(i))]) for i in range(num_layers)],
        num_frozen=int(said.get("num_frozen", "0")),
        model=said.get("model", ""),
        rope=said.get("rope", ""),
        tokenizer=said.get("tokenizer", ""),
        digest=said.get("digest", ""),
    )


def _piece(buffer: memoryview, entry: TensorEntry) -> Piece:
    whole = np.uint32 if entry.dtype == "F32" else np.uint16
    bits = np.frombuffer(buffer[entry.start : entry.end], whole)
    return Piece(bits.reshape(entry.shape), entry.dtype)


def _metadata(said: Mapping[str, str], num_tokens: int) -> Mapping[str, str]:
    """What a file of ours says of itself; nothing if it comes from another program."""
    kind = said.get("format", "")
    if not kind.startswith("tokasaurus cartridge"):
        return {}
    if kind != FORMAT:
        raise Refusal(f"the file is a {quoted(kind)}; this version reads {quoted(FORMAT)}")
    for name in ("digest", "rope", "tokenizer"):
        if name in said and not _DIGEST.fullmatch(said[name]):
            raise Refusal(f"its metadata says {name}: {quoted(said[name])}, which is no SHA-256")
    model = said.get("model", "")
    if len(model) > _MAX_NAME_LENGTH or not model.isprintable():
        raise Refusal(f"its metadata says model: {quoted(model)}, which is no model's name")
    frozen = said.get("num_frozen", "0")
    if not re.fullmatch(r"[0-9]{1,9}", frozen) or int(frozen) > num_tokens:
        raise Refusal(
            f"its metadata says num_frozen: {quoted(frozen)}; it has {num_tokens} positions"
        )
    return said
