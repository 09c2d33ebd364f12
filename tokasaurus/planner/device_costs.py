"""What a batch costs on the devices of a plan: as measured, or by arithmetic from their rates."""

from __future__ import annotations

from tokasaurus.config.memory import DTYPE_BYTES
from tokasaurus.config.slices import ModelFacts
from tokasaurus.planner.candidates import Candidate, Question
from tokasaurus.planner.cost_model import CostModel
from tokasaurus.planner.devices import Device
from tokasaurus.planner.estimate import Gpu, ModelShape, estimate
from tokasaurus.planner.pipeline import ONE_STAGE, Stages

__all__ = ["device_cost"]


def device_cost(question: Question, candidate: Candidate) -> tuple[CostModel, Stages]:
    """The costs of a replica's batches, and how stages share them.

    Stages take equal times. Between them, a batch's rows travel through a link.

    Raises:
        ConfigError: the device has no rate for the dtype.
    """
    if question.cost is not None:
        return question.cost, ONE_STAGE
    facts, device, layout = question.facts, question.device, candidate.layout
    dtype = candidate.dtype
    gpu = _gpu(device, dtype, layout.tp_size * layout.pp_size > 1)
    cost = estimate(_shape(facts, DTYPE_BYTES[dtype]), gpu, layout.tp_size)
    if layout.pp_size == 1:
        return cost, ONE_STAGE
    rows = candidate.manager.max_running / candidate.manager.num_lanes
    hop_s = device.link_s + rows * facts.hidden_size * DTYPE_BYTES[dtype] / device.link_bytes_per_s
    return cost, Stages.equal(layout.pp_size, hop_s)


def _gpu(device: Device, dtype: str, is_joined: bool) -> Gpu:
    if not is_joined:
        return Gpu(device.bytes_per_s, device.flops_per_s(dtype))
    return Gpu(
        device.bytes_per_s, device.flops_per_s(dtype), device.link_bytes_per_s, device.link_s
    )


def _shape(facts: ModelFacts, element_bytes: int) -> ModelShape:
    return ModelShape(
        num_layers=facts.num_layers,
        hidden_size=facts.hidden_size,
        num_heads=facts.num_heads,
        num_kv_heads=facts.num_kv_heads,
        head_dim=facts.kv_elements_per_token // (2 * facts.num_layers * facts.num_kv_heads),
        vocab_size=facts.vocab_size,
        num_layer_parameters=facts.num_product_parameters,
        weight_bytes=element_bytes,
        element_bytes=element_bytes,
    )
