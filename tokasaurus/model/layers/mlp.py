"""The feed-forward part of a decoder layer."""

from __future__ import annotations

from torch import Tensor, nn

from tokasaurus.model.config import ModelConfig
from tokasaurus.model.layers.linear import Linear
from tokasaurus.model.linear_methods.base import Sharding
from tokasaurus.model.placement import Placement

__all__ = ["GatedMLP"]


class GatedMLP(nn.Module):
    """SwiGLU, Shazeer 2020, https://arxiv.org/abs/2002.05202; one product makes gate and up."""

    def __init__(self, config: ModelConfig, place: Placement) -> None:
        super().__init__()
        inner = config.intermediate_size
        self.gate_up = Linear(
            place,
            config.hidden_size,
            {"gate": inner, "up": inner},
            Sharding.OUTPUTS,
            bias=config.mlp_bias,
        )
        self.down = Linear(
            place, inner, {"": config.hidden_size}, Sharding.INPUTS, bias=config.mlp_bias
        )
        self._operators = place.operators

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self._operators.silu_multiply(self.gate_up(x)))
        return result
