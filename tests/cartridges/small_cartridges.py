"""Small cartridges in files, and which of them a version is."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from tokasaurus.cartridges.specification import StoredCartridge
from tokasaurus.config.slices import CartridgeConfig

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 2, 2, 4


def tensors(seed: int, num_tokens: int = 5) -> dict[str, torch.Tensor]:
    """Keys and values by the names that workers read."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{kind}.{layer}": torch.randn(num_tokens, NUM_HEADS, HEAD_DIM, generator=generator)
        for layer in range(NUM_LAYERS)
        for kind in ("keys", "values")
    }


def safetensors_bytes(seed: int, num_tokens: int = 5) -> bytes:
    return save(tensors(seed, num_tokens))


def trained_bytes(seed: int, num_tokens: int = 5) -> bytes:
    """A file as trainers write it."""
    found = tensors(seed, num_tokens)

    def parameters(kind: str) -> torch.nn.ParameterList:
        layers = [found[f"{kind}.{layer}"] for layer in range(NUM_LAYERS)]
        return torch.nn.ParameterList(each.transpose(0, 1).unsqueeze(0) for each in layers)

    file = io.BytesIO()
    torch.save(
        {
            "trainable_keys": parameters("keys"),
            "trainable_values": parameters("values"),
            "fixed_keys": [],
            "fixed_values": [],
        },
        file,
    )
    return file.getvalue()


def has_seed(stored: StoredCartridge, seed: int, num_tokens: int = 5) -> bool:
    """Whether a version has the tensors of this seed."""
    found, wanted = load_file(stored.path), tensors(seed, num_tokens)
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name], wanted[name]) for name in wanted
    )


def config(directory: Path, **changes: object) -> CartridgeConfig:
    """Of a store in a directory, which is its only root."""
    made = CartridgeConfig(
        directory=str(directory),
        sources=("local", "wandb", "huggingface", "s3", "http"),
        roots=(str(directory),),
        temporary_root=False,
        hosts=(),
        max_bytes=1 << 20,
        max_tokens=1000,
        max_stored_bytes=1 << 30,
        max_host_bytes=1 << 20,
        timeout_s=60.0,
    )
    return dataclasses.replace(made, **changes)
