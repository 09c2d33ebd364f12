"""Random weights as a source of (name, tensor): for measuring a model of which there is no copy."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from math import prod

import torch
from torch import Tensor

__all__ = ["dummy_tensors"]

_STD = 0.02  # what transformers initialises with, unless config.json says otherwise

# Numbers that are drawn. A larger tensor repeats them: to draw a billion takes many seconds.
_NUM_DRAWN = 1 << 20


def dummy_tensors(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of these shapes, in bf16. Each is a function of its name and shape.

    Norms are ones and biases are zeros, so that hidden states stay finite in every dtype.
    """
    for name, shape in shapes.items():
        if name.endswith(".bias"):
            yield name, torch.zeros(shape, dtype=torch.bfloat16)
        elif len(shape) == 1:
            yield name, torch.ones(shape, dtype=torch.bfloat16)
        else:
            yield name, _random(name, shape)


def _random(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    size = prod(shape)
    # One more than a power of two, so that rows of usual lengths do not repeat.
    drawn = torch.empty(min(size, _NUM_DRAWN + 1), dtype=torch.float32)
    drawn.normal_(0, _STD, generator=generator)
    tensor = torch.empty(size, dtype=torch.bfloat16)
    for part in torch.split(tensor, len(drawn)):
        part.copy_(drawn[: len(part)])
    return tensor.view(shape)
