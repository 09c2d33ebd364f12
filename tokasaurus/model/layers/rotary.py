"""Rotary position embeddings: the inverse frequencies of each kind, and the angles of a batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokasaurus.model.backend.base import Rotation
from tokasaurus.model.rope_config import (
    DefaultRope,
    LinearRope,
    Llama3Rope,
    RopeConfig,
    YarnRope,
)

__all__ = ["Rotary"]


class Rotary:
    """Turns positions into rotations, once per batch for all layers.

    It keeps no table over positions: at 128k positions, reading one would cost more memory traffic
    than computing the cosines.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device) -> None:
        frequencies, self._scale = _frequencies(rope, head_dim)
        self._frequencies = frequencies.to(device)

    def __call__(self, positions: Tensor) -> Rotation:
        angles = (positions.to(torch.float32)[:, None] * self._frequencies)[:, None, :]
        return Rotation(angles.cos() * self._scale, angles.sin() * self._scale)


def _frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    # Computed in fp32 step by step, as in transformers: at position 100,000 the last bit of a
    # frequency makes an angle that shows in the logits.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / rope.theta**exponents
    if isinstance(rope, DefaultRope):
        return plain, 1.0
    if isinstance(rope, LinearRope):
        return plain / rope.factor, 1.0
    if isinstance(rope, Llama3Rope):
        return _llama3(rope, plain), 1.0
    return _yarn(rope, exponents, head_dim), _yarn_scale(rope)


def _llama3(rope: Llama3Rope, plain: Tensor) -> Tensor:
    # The number of turns that a component makes within the original context decides. Those with
    # fewer than low_freq_factor turns are slowed down by the factor, those with more than
    # high_freq_factor are kept, and the rest are mixed.
    turns = rope.original_max_position * plain / (2 * math.pi)
    span = rope.high_freq_factor - rope.low_freq_factor
    kept = ((turns - rope.low_freq_factor) / span).clamp(0, 1)
    return (1 - kept) * plain / rope.factor + kept * plain


def _yarn(rope: YarnRope, exponents: Tensor, head_dim: int) -> Tensor:
    def component(turns: float) -> float:
        """The component that makes this number of turns within the original context."""
        context = rope.original_max_position / (turns * 2 * math.pi)
        return head_dim * math.log(context) / (2 * math.log(rope.theta))

    first, last = component(rope.beta_fast), component(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 0.001
    slowed = ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
    periods = rope.theta**exponents
    return slowed / (rope.factor * periods) + (1 - slowed) / periods


def _yarn_scale(rope: YarnRope) -> float:
    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return grown(rope.mscale) / grown(rope.mscale_all_dim)
    return grown(1.0)
