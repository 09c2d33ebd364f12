"""Cost models by arithmetic, from a model's published sizes and a device's rates."""

from __future__ import annotations

from dataclasses import dataclass

from tokasaurus.planner.cost_model import (
    AttentionCosts,
    CostModel,
    DrawCosts,
    ExchangeCosts,
    HostCosts,
)
from tokasaurus.planner.curve import Curve

__all__ = ["ESTIMATE_ERROR", "Gpu", "ModelShape", "estimate"]


@dataclass(frozen=True)
class Gpu:
    """What a device sustains, which is less than its data sheet promises.

    Attributes:
        bytes_per_s: of memory.
        flops_per_s: of products in the dtype of the weights.
        link_bytes_per_s: to the other devices of a replica, in one direction.
        link_s: the latency of an all-reduce.
    """

    bytes_per_s: float
    flops_per_s: float
    link_bytes_per_s: float = float("inf")
    link_s: float = 0.0


@dataclass(frozen=True)
class ModelShape:
    """The published sizes of a decoder.

    Attributes:
        num_layer_parameters: of all layers together.
        weight_bytes: of a number in the layers' weights.
        element_bytes: of any other number: of the head, activations and KV cache.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_layer_parameters: float
    weight_bytes: float = 2.0
    element_bytes: float = 2.0


ESTIMATE_ERROR = 0.3
"""What arithmetic alone may be off by, as a share; nothing was measured."""

_LAYER_OVERHEAD_S = 20e-6  # an estimate: about ten launches of 2 microseconds, as in a CUDA graph
_SAMPLING_PASSES = 4  # an estimate: passes over fp32 logits in memory until a token is drawn
_FILTERS_PASSES = 12  # the same with top_k or top_p, which sort


def estimate(shape: ModelShape, gpu: Gpu, tp_size: int = 1) -> CostModel:
    """A cost model by arithmetic alone.

    Weights are read at the rate of memory, and multiplied at the rate of products; a batch takes
    the longer of the two. A row that decodes reads its keys and values from memory. A chunk of a
    prompt, or a group, reads them once.

    Args:
        shape: of the model.
        gpu: each of the devices.
        tp_size: devices that share each layer. Two all-reduces follow in each layer, and one after
            the embedding; each sends 2 (tp_size - 1) / tp_size times its bytes through a link
            (Patarasuk and Yuan 2009, https://doi.org/10.1016/j.jpdc.2008.09.002).
    """
    layer_flops_s = 2 * shape.num_layer_parameters / tp_size / gpu.flops_per_s
    layer_bytes_s = shape.weight_bytes * shape.num_layer_parameters / tp_size / gpu.bytes_per_s
    num_head_parameters = shape.hidden_size * shape.vocab_size / tp_size
    logits_s = 4 * shape.vocab_size / gpu.bytes_per_s
    head_size = shape.num_layers * shape.head_dim / tp_size
    kv_s = 2 * head_size * shape.num_kv_heads * shape.element_bytes / gpu.bytes_per_s
    # A product with the keys, and one with the values.
    pair_s = 4 * head_size * shape.num_heads / gpu.flops_per_s
    return CostModel(
        host=HostCosts(batch_s=shape.num_layers * _LAYER_OVERHEAD_S),
        layers=Curve.roofline(layer_bytes_s, layer_flops_s),
        exchange=_exchange(shape, gpu, tp_size),
        attention=AttentionCosts(position_s=max(kv_s, pair_s), pair_s=pair_s, layout_s=kv_s),
        head=Curve.roofline(
            shape.element_bytes * num_head_parameters / gpu.bytes_per_s,
            2 * num_head_parameters / gpu.flops_per_s,
        ),
        draws=DrawCosts(
            greedy_s=_SAMPLING_PASSES * logits_s,
            sampled_s=_SAMPLING_PASSES * logits_s,
            top_k_s=_FILTERS_PASSES * logits_s,
            top_p_s=_FILTERS_PASSES * logits_s,
            adjusted_s=_SAMPLING_PASSES * logits_s,
            logprobs_s=_SAMPLING_PASSES * logits_s,
        ),
        error=ESTIMATE_ERROR,
    )


def _exchange(shape: ModelShape, gpu: Gpu, tp_size: int) -> ExchangeCosts:
    if tp_size == 1:
        return ExchangeCosts()
    num_reductions = 2 * shape.num_layers + 1
    row_bytes = 2 * (tp_size - 1) / tp_size * shape.hidden_size * shape.element_bytes
    return ExchangeCosts(
        batch_s=num_reductions * gpu.link_s,
        row_s=num_reductions * row_bytes / gpu.link_bytes_per_s,
    )
