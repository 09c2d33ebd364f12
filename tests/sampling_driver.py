"""Plans, sends and runs in one call what the worker plans for a whole batch before it runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokasaurus.model.sampling import logprobs, sampler
from tokasaurus.model.sampling.adjustments import AdjustmentTable
from tokasaurus.model.sampling.kinds import plan_rows
from tokasaurus.model.sampling.logprobs import Logprobs, plan_logprobs
from tokasaurus.model.sampling.parameters import SamplingParameters
from tokasaurus.model.upload import Staging
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.protocol.messages import SlotParameters

__all__ = [
    "adjusted_by",
    "draw",
    "enter_slots",
    "logprobs_of",
    "parameters",
    "processed",
    "random_batch",
    "record",
    "sent",
]


def parameters(num_rows: int, **columns: Any) -> SamplingParameters:
    """Neutral parameters with some columns set."""
    result = SamplingParameters.neutral(num_rows)
    for name, values in columns.items():
        result[name][:] = values
    return result


def random_batch(num_rows: int, vocab_size: int, seed: int) -> tuple[Tensor, SamplingParameters]:
    """All combinations of filters; rows are flat and peaked, some with ties, some with masks."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (num_rows, vocab_size)) * rng.choice([0, 0.01, 0.3, 1], (num_rows, 1))
    if seed % 2:
        logits = logits.round()
    is_masked = (rng.random((num_rows, vocab_size)) < 0.7) & (rng.random((num_rows, 1)) < 0.2)
    is_masked[:, 0] = False
    logits[is_masked] = -np.inf
    chosen = parameters(
        num_rows,
        temperature=rng.choice([0, 0.6, 1, 1, 1.5], num_rows),
        top_k=rng.choice([0, 0, 1, 20, 70, 400, 3000], num_rows),
        top_p=rng.choice([1, 1, 0.9, 0.3, 0.99], num_rows),
        min_p=rng.choice([0, 0, 0.05], num_rows),
        seed=rng.integers(0, 2**63, num_rows),
        sample_index=rng.integers(0, 1000, num_rows),
        num_generated=rng.integers(0, 5000, num_rows),
        num_logprobs=rng.choice([-1, 0, 1, 5], num_rows),
        logprobs_mode=rng.choice([0, 1, 2], num_rows),
    )
    return torch.from_numpy(logits.astype(np.float32)), chosen


def sent(plan: Any, *arguments: Any, device: str | torch.device = "cpu", **options: Any) -> Any:
    """What ``plan`` returns, which takes a staging buffer last, once the buffer is sent."""
    staging = Staging(torch.device(device))
    planned = plan(*arguments, staging, **options)
    staging.send()
    return planned


def draw(logits: Tensor, chosen: SamplingParameters) -> Tensor:
    plan = sent(plan_rows, chosen, logits.shape[1], draws=True, device=logits.device)
    return sampler.draw(logits, plan)


def processed(logits: Tensor, chosen: SamplingParameters) -> Tensor:
    plan = sent(plan_rows, chosen, logits.shape[1], draws=False, device=logits.device)
    return sampler.processed(logits, plan)


def logprobs_of(
    logits: Tensor,
    token_ids: Tensor,
    asked: SamplingParameters,
    width: int,
    adjusted: Tensor | None = None,
    *,
    with_ranks: bool = False,
) -> Logprobs:
    plan = sent(plan_logprobs, asked, logits.shape[1], device=logits.device)
    return logprobs.logprobs_of(logits, token_ids, plan, width, adjusted, with_ranks=with_ranks)


def enter_slots(table: AdjustmentTable, entering: SlotParameters) -> None:
    sent(table.enter, entering)
    table.write_entries()


def adjusted_by(
    table: AdjustmentTable, logits: Tensor, slots: Int32Array, num_generated: Int32Array
) -> Tensor:
    """The adjusted logits; the same tensor if no slot asks."""
    plan = sent(table.plan, slots, num_generated)
    return logits if plan is None else plan.apply(logits)


def record(table: AdjustmentTable, slots: Int32Array, token_ids: Tensor) -> Int32Array | None:
    """The rows that are cut."""
    recording = sent(table.plan_record, slots)
    if recording is None:
        return None
    recording.record(token_ids)
    return recording.lost
