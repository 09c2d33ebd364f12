"""Cartridges that stand for token ids, made by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from oracle import reference_cache
from safetensors.torch import save_file


def save_cartridge(model: Path, ids: list[int], path: Path) -> Path:
    """The keys and values that the reference computes for these ids, as a cartridge's file.

    A file whose name ends in .pt has the layout of trainers.
    """
    cache = reference_cache(model, ids)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    if path.suffix == ".pt":
        torch.save(_as_trained(cache), part)
    else:
        tensors = {}
        for number, layer in enumerate(cache.layers):
            for kind, tensor in (("keys", layer.keys), ("values", layer.values)):
                tensors[f"{kind}.{number}"] = tensor[0].transpose(0, 1).contiguous()
        save_file(tensors, part)
    part.replace(path)
    return path


def _as_trained(cache: Any) -> dict[str, torch.nn.ParameterList]:
    """The first position frozen, and the others trained."""
    lists = {}
    for kind in ("keys", "values"):
        tensors = [getattr(layer, kind).clone() for layer in cache.layers]
        lists[f"frozen_{kind}"] = torch.nn.ParameterList(each[:, :, :1] for each in tensors)
        lists[f"trainable_{kind}"] = torch.nn.ParameterList(each[:, :, 1:] for each in tensors)
    return lists
