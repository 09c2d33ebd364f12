"""Batches that tests write by hand, and a device that runs them."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np

from tokasaurus.planner.cost_model import INSTANT, CostModel
from tokasaurus.planner.lengths import CompletionLengths, DrawnLengths
from tokasaurus.planner.simulated_device import SimulatedDevice
from tokasaurus.protocol.messages import ForwardBatch, Sampling, SlotParameters

PAGE_SIZE = 4
NEVER = DrawnLengths(np.array([1 << 40]))


def int32(values):
    return np.array(values, np.int32)


@dataclasses.dataclass
class Entering:
    """A sequence that gets a slot."""

    slot: int
    seed: int = 0
    sample_index: int = 0
    num_generated: int = 0
    num_logprobs: int = -1


@dataclasses.dataclass
class Fed:
    """A chunk of a prompt, and the slots that draw from its last row."""

    slot: int
    start: int
    length: int
    draws: tuple[int, ...] = ()
    num_logprobs: int = -1


class Hand:
    """Numbers batches and runs them on a device of 16 slots."""

    def __init__(self, lengths: CompletionLengths = NEVER, cost: CostModel = INSTANT) -> None:
        self.device = SimulatedDevice(cost, lengths, num_slots=16, page_size=PAGE_SIZE)
        self.number = 0

    def run(self, entering=(), decode=(), fed=(), **changes):
        batch = batch_of(self.number, entering, decode, fed)
        self.number += 1
        return self.device.run(msgspec.structs.replace(batch, **changes))


def batch_of(number, entering=(), decode=(), fed=()):
    """A batch of that number: what enters slots, what decodes, and what is fed."""
    return ForwardBatch(
        number=number,
        parameters=_parameters(entering) if entering else None,
        decode_slots=int32(decode),
        prefill_slots=int32([chunk.slot for chunk in fed]),
        prefill_starts=int32([chunk.start for chunk in fed]),
        prefill_lengths=int32([chunk.length for chunk in fed]),
        prefill_ids=np.zeros(sum(chunk.length for chunk in fed), np.int32),
        prefill_num_logprobs=int32([chunk.num_logprobs for chunk in fed]),
        prefill_next_ids=int32([-1 if chunk.draws else 7 for chunk in fed]),
        draw_chunks=int32([index for index, chunk in enumerate(fed) for _ in chunk.draws]),
        draw_slots=int32([slot for chunk in fed for slot in chunk.draws]),
    )


def _parameters(entering):
    columns = {
        field.name: int32([getattr(each, field.name) for each in entering])
        for field in dataclasses.fields(Entering)
        if field.name not in ("slot", "seed")
    }
    count = len(entering)
    return SlotParameters(
        slots=int32([each.slot for each in entering]),
        samplings=(Sampling(),),
        sampling_index=np.zeros(count, np.int32),
        seed=np.array([each.seed for each in entering], np.int64),
        **columns,
    )
