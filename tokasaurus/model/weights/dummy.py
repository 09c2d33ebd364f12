"""Random weights as a source of (name, tensor): for measuring a model of which there is no copy."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

__all__ = ["dummy_tensors"]

_STD = 0.02  # what transformers initialises with, unless config.json says otherwise


def dummy_tensors(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of these shapes, in fp32. Each is a function of its name and shape.

    Norms are ones and biases are zeros, so that hidden states stay finite in every dtype.
    """
    for name, shape in shapes.items():
        if name.endswith(".bias"):
            yield name, torch.zeros(shape)
        elif len(shape) == 1:
            yield name, torch.ones(shape)
        else:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            yield name, torch.empty(shape).normal_(0, _STD, generator=generator)
