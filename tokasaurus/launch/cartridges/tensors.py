"""Cartridges from tensors of torch, and as files of torch.save."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokasaurus.cartridge_file import CartridgeFile, key_name, value_name
from tokasaurus.cartridges.contents import Contents, Layer, Piece, Refusal
from tokasaurus.cartridges.new_file import disk_error, new_file, put_in_place
from tokasaurus.cartridges.specification import CartridgeMetadata
from tokasaurus.cartridges.writing import save
from tokasaurus.errors import ModelError
from tokasaurus.model.weights.weight_files import read_tensors

__all__ = ["save_tensors", "save_torch_file"]

_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def save_tensors(
    target: Path,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    num_frozen: int = 0,
    model: str = "",
    rope: str = "",
    tokenizer: str = "",
) -> CartridgeMetadata:
    """Writes a cartridge as a safetensors file.

    Args:
        target: takes its name when it is complete.
        keys: for each layer [kv_heads, tokens, head_dim], after RoPE, on any device.
        values: of the same shape.
        num_frozen, model, rope, tokenizer: as in ``Contents``.

    Raises:
        ModelError: a number is no number, infinite or too large.
        StorageFull, EngineError: it cannot be written.
    """
    layers: list[Layer] = [
        ([_piece(key)], [_piece(value)]) for key, value in zip(keys, values, strict=True)
    ]
    try:
        return save(Contents("", layers, num_frozen, model, rope, tokenizer), target)
    except Refusal as refusal:
        raise ModelError(f"the model computes what is no cartridge: {refusal}") from None


def _piece(tensor: Tensor) -> Piece:
    whole = torch.int32 if tensor.dtype == torch.float32 else torch.int16
    bits = tensor.detach().cpu().transpose(0, 1).view(whole).numpy()
    return Piece(bits.view(np.uint32 if whole == torch.int32 else np.uint16), _DTYPES[tensor.dtype])


def save_torch_file(source: Path, target: Path, num_frozen: int) -> None:
    """Writes a checked safetensors cartridge in the layout of trainers, as ``torch.save`` does.

    Args:
        source: of ``read_cartridge``.
        target: takes its name when it is complete.
        num_frozen: positions at the beginning that training shall not change.

    Raises:
        ModelError: the source cannot be read.
        StorageFull, EngineError: the target cannot be written.
    """
    with CartridgeFile(source) as file:
        tensors = dict(read_tensors(file))
        num_layers = len(tensors) // 2
        num_tokens = file.num_tokens
        ranges = {"frozen": slice(0, num_frozen), "trainable": slice(num_frozen, num_tokens)}
        saved: dict[str, Any] = {
            f"{part}_{kind}": torch.nn.ParameterList(
                torch.nn.Parameter(
                    tensors[name(layer)][where].transpose(0, 1)[None].contiguous(),
                    requires_grad=part == "trainable",
                )
                for layer in range(num_layers)
            )
            if where.stop > where.start
            else []
            for part, where in ranges.items()
            for kind, name in (("keys", key_name), ("values", value_name))
        }
        with new_file(target) as (made, path):
            try:
                with os.fdopen(os.dup(made.fileno()), "wb") as writer:
                    torch.save(saved, writer)
            except OSError as error:
                raise disk_error(error) from error
            put_in_place(made, path, target)
