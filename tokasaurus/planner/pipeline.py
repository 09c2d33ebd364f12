"""A simulated device that is cut into stages, and their clocks.

::

    stage 0    │ 7  │ 8  │ 9  │ 10 │    │ 11 │        11 decodes a slot for which 8 drew a token:
    stage 1         │ 7  │ 8  │ 9  │ 10 │    │ 11 │   it waits for the ids of 8
    stage 2              │ 7  │ 8  │ 9  │ 10 │
                                   └ids─▶

Every stage runs all batches in the order of their numbers. A batch enters a stage when it has left
the stage before and the stage is free. The first stage also waits for the ids that the batch's
decode rows need, which come from the last stage. A hop is the way from one stage to the next, or
back to the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np

from tokasaurus.errors import ConfigError
from tokasaurus.planner.simulated_device import SimulatedDevice
from tokasaurus.protocol.arrays import Float64Array
from tokasaurus.protocol.commands import Control, ControlDone
from tokasaurus.protocol.messages import ForwardBatch, ForwardResult

__all__ = ["ONE_STAGE", "SimulatedPipeline", "Span", "Stages", "busy_shares"]


@dataclass(frozen=True)
class Stages:
    """How a model is cut.

    Attributes:
        shares: of a batch's time, one for each stage; together 1.
        hop_s: how long tensors or ids travel from one stage to another.
    """

    shares: tuple[float, ...] = (1.0,)
    hop_s: float = 0.0

    @staticmethod
    def of(costs: Sequence[float], hop_s: float = 0.0) -> Stages:
        """Stages with these costs, on any scale.

        Raises:
            ConfigError: there is none, or one of them or ``hop_s`` is negative.
        """
        total = sum(costs)
        if not total > 0 or min(costs) < 0 or hop_s < 0:
            raise ConfigError(
                f"costs of stages and the time of a hop are at least 0: {costs}, {hop_s}"
            )
        return Stages(tuple(cost / total for cost in costs), hop_s)

    @staticmethod
    def equal(count: int, hop_s: float = 0.0) -> Stages:
        """Stages that take the same time."""
        return Stages.of([1.0] * count, hop_s)

    @property
    def count(self) -> int:
        """Stages."""
        return len(self.shares)


ONE_STAGE = Stages()


class Span(NamedTuple):
    """When a batch is at a stage."""

    start_s: float
    end_s: float


class SimulatedPipeline:
    """Runs numbered batches and controls in order, and says when.

    Args:
        device: what all stages compute together.
        stages: how it is cut.
        num_slots: the number of slots of the manager.

    Attributes:
        waited_s: how long stages had nothing to run before a batch came: the mean over stages.
    """

    def __init__(self, device: SimulatedDevice, stages: Stages, num_slots: int) -> None:
        self.waited_s = 0.0
        self._device = device
        self._stages = stages
        self._free_at = [0.0] * stages.count
        # By slot: when the first stage has the id that was drawn last.
        self._ids_at: Float64Array = np.zeros(num_slots)

    def run(self, batch: ForwardBatch, sent_at: float) -> tuple[ForwardResult, list[Span]]:
        """Runs a batch.

        Args:
            batch: the next one.
            sent_at: when all stages have it.

        Returns:
            Its result, which leaves the last stage at the end of the last span; and a span for each
            stage. ``device_s`` of the result is the time in the last stage.

        Raises:
            ProtocolError: see ``SimulatedDevice.run``.
        """
        result = self._device.run(batch)
        ready_at = sent_at
        if len(batch.decode_slots):
            ready_at = max(ready_at, float(self._ids_at[batch.decode_slots].max()))
        spans: list[Span] = []
        for stage, share in enumerate(self._stages.shares):
            start = max(ready_at, self._free_at[stage])
            self.waited_s += (start - self._free_at[stage]) / self._stages.count
            spans.append(Span(start, start + share * result.device_s))
            self._free_at[stage] = spans[-1].end_s
            ready_at = spans[-1].end_s + self._stages.hop_s
        if self._stages.count > 1:
            self._ids_at[batch.decode_slots] = self._ids_at[batch.draw_slots] = ready_at
            last_s = spans[-1].end_s - spans[-1].start_s
            result = msgspec.structs.replace(result, device_s=last_s)
        return result, spans

    def carry_out(self, control: Control, sent_at: float) -> tuple[ControlDone, float]:
        """Carries out a control, which takes no time; returns its answer, and when it comes."""
        return self._device.carry_out(control), max(sent_at, self._free_at[-1])

    def run_late(self, now: float) -> None:
        """The last stage is busy until this moment at least, since simulating it took so long."""
        self._free_at[-1] = max(self._free_at[-1], now)


def busy_shares(spans: Sequence[Sequence[Span]], start_s: float, end_s: float) -> tuple[float, ...]:
    """[stages] the share of the time from ``start_s`` to ``end_s`` in which each ran a batch.

    Args:
        spans: [batches][stages].
        start_s: the beginning of a time.
        end_s: its end, later than that.
    """
    times = np.clip(np.array(spans, np.float64), start_s, end_s)  # [batches, stages, 2]
    shares = (times[:, :, 1] - times[:, :, 0]).sum(axis=0) / (end_s - start_s)
    return tuple(shares.tolist())
