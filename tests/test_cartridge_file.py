"""Cartridges whose tensors fit a model, and errors about those that do not."""

from __future__ import annotations

import pytest
import torch
from rows import check_each
from safetensors.torch import save_file

from tokasaurus.cartridge_file import CartridgeFile
from tokasaurus.errors import ModelError

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 3, 2, 4


def cartridge(num_tokens=5, dtype=torch.bfloat16, num_layers=NUM_LAYERS):
    return {
        f"{kind}.{layer}": torch.zeros(num_tokens, NUM_HEADS, HEAD_DIM, dtype=dtype)
        for kind in ("keys", "values")
        for layer in range(num_layers)
    }


def changed(**tensors):
    return {**cartridge(), **{name.replace("_", "."): each for name, each in tensors.items()}}


def test_a_cartridge_says_how_many_tokens_it_has(tmp_path):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        save_file(cartridge(7, dtype), tmp_path / "c")
        with CartridgeFile(tmp_path / "c") as file:
            assert file.num_tokens == 7
            file.check(NUM_LAYERS, NUM_HEADS, HEAD_DIM)


def test_a_cartridge_that_does_not_fit_is_refused(tmp_path):
    def check(row):
        _, tensors, message = row
        save_file(tensors, tmp_path / "c")
        with CartridgeFile(tmp_path / "c") as file, pytest.raises(ModelError, match=message):
            file.check(NUM_LAYERS, NUM_HEADS, HEAD_DIM)

    rows = [
        ("weights", {"model.norm.weight": torch.ones(4)}, "is not a cartridge: it needs"),
        ("no tokens", cartridge(0), "is not a cartridge"),
        ("a layer less", cartridge(num_layers=2), "lacks tensors: keys.2, values.2; .*3 layers"),
        ("a layer more", cartridge(num_layers=4), "does not have: keys.3, values.3"),
        ("another tensor", changed(x=torch.ones(1)), "does not have: x"),
        (
            "a layer with fewer tokens",
            changed(values_1=torch.zeros(4, 2, 4)),
            r"values\.1 has shape \[4, 2, 4\]; this model needs \[5, 2, 4\]",
        ),
        ("the trainer's shape", changed(keys_2=torch.zeros(1, 2, 5, 4)), r"keys\.2 has shape"),
        ("heads", changed(keys_1=torch.zeros(5, 4, 4)), r"needs \[5, 2, 4\]"),
        ("integers", changed(keys_1=torch.zeros(5, 2, 4, dtype=torch.int8)), "keys.1 is I8; it"),
    ]
    check_each(rows, check)
