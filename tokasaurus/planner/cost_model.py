"""How long a batch takes on a device, by a formula.

::

    seconds = overhead_s                                        launches, the host's part
            + max(weight_bytes / bytes_per_s,                   every weight is read once ...
                  tokens * flops_per_token / flops_per_s)       ... while every token is multiplied
            + context_tokens * kv_bytes_per_token / bytes_per_s attention reads each context once
            + draws * draw_s                                    head and sampling of a drawn token

The products inside attention are left out, which is optimistic for long prompts. A prefix that rows
share is counted for each of them, which is pessimistic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tokasaurus.errors import ConfigError

__all__ = [
    "INSTANT",
    "PRESETS",
    "CostModel",
    "Gpu",
    "ModelShape",
    "cost_model",
    "estimate",
    "fixed",
]


@dataclass(frozen=True)
class CostModel:
    """The constants of the formula above. Bandwidth and speed may be infinite."""

    weight_bytes: float  # read by every batch that has tokens
    flops_per_token: float
    kv_bytes_per_token: float  # keys and values of one position in all layers
    bytes_per_s: float
    flops_per_s: float
    overhead_s: float  # for every batch
    draw_s: float = 0.0  # for every drawn token

    def batch_s(self, num_tokens: int, num_context_tokens: int, num_draws: int) -> float:
        """The seconds that a batch takes.

        Args:
            num_tokens: the rows of the forward pass: decode rows and prompt tokens.
            num_context_tokens: the positions that attention reads: the sum of the lengths of all
                sequences in the batch, including their new tokens.
            num_draws: the rows that draw a token.
        """
        if num_tokens == 0:  # such a batch only changes slots and page tables
            return self.overhead_s
        products_s = num_tokens * self.flops_per_token / self.flops_per_s
        attention_s = num_context_tokens * self.kv_bytes_per_token / self.bytes_per_s
        layers_s = max(self.weight_bytes / self.bytes_per_s, products_s)
        return self.overhead_s + layers_s + attention_s + num_draws * self.draw_s


@dataclass(frozen=True)
class Gpu:
    """What a device sustains, which is less than its data sheet promises."""

    bytes_per_s: float
    flops_per_s: float  # bf16 products


@dataclass(frozen=True)
class ModelShape:
    """The published sizes of a decoder in bf16."""

    num_layers: int
    num_layer_parameters: float  # of all layers together
    num_head_parameters: float  # hidden * vocabulary
    vocab_size: int
    kv_size: int  # KV heads * head size


_BYTES = 2  # of a bf16 number
_LAYER_OVERHEAD_S = 20e-6  # an estimate: about ten launches of 2 microseconds, as in a CUDA graph
_SAMPLING_PASSES = 4  # an estimate: passes over fp32 logits in memory until a token is drawn


def estimate(shape: ModelShape, gpu: Gpu) -> CostModel:
    """A cost model by arithmetic alone. Expect it to be off by tens of percent."""
    head_s = 2 * shape.num_head_parameters / gpu.flops_per_s
    logits_s = _SAMPLING_PASSES * 4 * shape.vocab_size / gpu.bytes_per_s
    return CostModel(
        weight_bytes=_BYTES * (shape.num_layer_parameters + shape.num_head_parameters),
        flops_per_token=2 * shape.num_layer_parameters,
        kv_bytes_per_token=2 * shape.num_layers * shape.kv_size * _BYTES,
        bytes_per_s=gpu.bytes_per_s,
        flops_per_s=gpu.flops_per_s,
        overhead_s=shape.num_layers * _LAYER_OVERHEAD_S,
        draw_s=head_s + logits_s,
    )


def fixed(step_s: float) -> CostModel:
    """Every batch takes the same time."""
    return CostModel(0.0, 0.0, 0.0, math.inf, math.inf, step_s)


INSTANT = fixed(0.0)

# An estimate. The data sheet of the H100 SXM promises 3.35 TB/s and 989 TFLOP/s of dense bf16. The
# H200 has the same processor with 4.8 TB/s; one was measured at 4.3 TB/s and 790 TFLOP/s. The same
# shares are assumed here, less a quarter of the products for shapes that are not ideal.
_H100 = Gpu(bytes_per_s=3.0e12, flops_per_s=590e12)

# From the published configurations of Llama-3.2-1B (16 layers, hidden 2048, 8 KV heads of 64, tied
# embedding) and Llama-3.1-8B (32 layers, hidden 4096, 8 KV heads of 128).
_LLAMA_1B = ModelShape(16, 0.973e9, 0.263e9, 128256, 512)
_LLAMA_8B = ModelShape(32, 6.98e9, 0.525e9, 128256, 1024)

PRESETS = {
    "llama-1b-h100": estimate(_LLAMA_1B, _H100),
    "llama-8b-h100": estimate(_LLAMA_8B, _H100),
    "instant": INSTANT,
}


def cost_model(name: str) -> CostModel:
    """A preset by name, or ``fixed:SECONDS``.

    Raises:
        ConfigError: there is no such preset, or the seconds are not a number of at least 0.
    """
    if name in PRESETS:
        return PRESETS[name]
    kind, _, seconds = name.partition(":")
    try:
        step_s = float(seconds) if kind == "fixed" else math.nan
    except ValueError:
        step_s = math.nan
    if not 0 <= step_s < math.inf:
        known = ", ".join(PRESETS)
        raise ConfigError(f"cost={name}: expected one of {known}, or such as fixed:0.003")
    return fixed(step_s)
