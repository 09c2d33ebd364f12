"""Cartridges that stand for token ids, made by transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from oracle import reference_model
from safetensors.torch import save_file


def save_cartridge(model: Path, ids: list[int], path: Path) -> Path:
    """The keys and values that the reference computes for these ids, as a cartridge's file."""
    with torch.inference_mode():
        cache = reference_model(model)(torch.tensor([ids]), use_cache=True).past_key_values
    tensors = {}
    for number, layer in enumerate(cache.layers):
        for kind, tensor in (("keys", layer.keys), ("values", layer.values)):
            tensors[f"{kind}.{number}"] = tensor[0].transpose(0, 1).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(tensors, part)
    part.replace(path)
    return path
