"""Numbers in e4m3: 4 bits of exponent, 3 of mantissa, no infinity.

Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["E4M3", "LARGEST", "to_e4m3"]

E4M3 = torch.float8_e4m3fn

LARGEST = 448.0
"""The largest number. Those from 2**-6 on have a relative error of at most 1/16."""


def to_e4m3(x: Tensor) -> Tensor:
    """Rounds to the nearest number; what is larger than the largest becomes it. NaN stays NaN."""
    return x.clamp(-LARGEST, LARGEST).to(E4M3)
