"""The clocks of a pipeline's stages: when a batch is at which stage.

::

    stage 0   [ 7 ][ 8 ][ 9 ][10 ]      [11 ]       10 waits for nothing
    stage 1        [ 7 ][ 8 ][ 9 ][10 ]      [11 ]  11 decodes a slot that 9 sampled:
    stage 2             [ 7 ][ 8 ][ 9 ]─ids─▶ ...   it waits for 9's ids

Every stage runs all batches in the order of their numbers. A batch enters a stage when it has left
the stage before and the stage is free. The first stage also waits for the ids that its decode rows
need, which come back from the last one. A hop is the way from one stage to the next, or back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokasaurus.errors import ConfigError
from tokasaurus.protocol.arrays import Float64Array
from tokasaurus.protocol.messages import ForwardBatch

__all__ = ["ONE_STAGE", "StageClocks", "Stages"]


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
        if not total > 0 or min(costs) < 0 or not hop_s >= 0:
            raise ConfigError(f"costs of stages and hops must not be negative: {costs}, {hop_s}")
        return Stages(tuple(cost / total for cost in costs), hop_s)

    @staticmethod
    def equal(count: int, hop_s: float = 0.0) -> Stages:
        """Stages that take the same time."""
        return Stages.of([1.0] * count, hop_s)


ONE_STAGE = Stages()


class StageClocks:
    """The stages of one replica.

    Args:
        stages: how the model is cut.
        num_slots: the number of slots of the manager.
    """

    def __init__(self, stages: Stages, num_slots: int) -> None:
        self._shares = stages.shares
        self._hop_s = stages.hop_s if len(stages.shares) > 1 else 0.0
        self._free_at = [0.0] * len(stages.shares)
        self._waited_s = [0.0] * len(stages.shares)
        # By slot: when the first stage has the id that was sampled last.
        self._ids_at: Float64Array = np.zeros(num_slots)
        # Of each batch: when it enters and leaves each stage.
        self._spans: list[list[tuple[float, float]]] = []

    @property
    def free_at(self) -> float:
        """When the last stage has run everything so far."""
        return self._free_at[-1]

    @property
    def waited_s(self) -> float:
        """How long stages had nothing to run before a batch came: the mean over stages."""
        return sum(self._waited_s) / len(self._waited_s)

    def run(self, batch: ForwardBatch, device_s: float, sent_at: float) -> float:
        """Runs a batch.

        Args:
            batch: the next one.
            device_s: how long all stages take together.
            sent_at: when all stages have it.

        Returns:
            When its result leaves the last stage.
        """
        ready_at = sent_at
        if len(batch.decode_slots):
            ready_at = max(ready_at, float(self._ids_at[batch.decode_slots].max()))
        spans: list[tuple[float, float]] = []
        for stage, share in enumerate(self._shares):
            start = max(ready_at, self._free_at[stage])
            self._waited_s[stage] += start - self._free_at[stage]
            end = start + share * device_s
            spans.append((start, end))
            self._free_at[stage] = end
            ready_at = end + self._hop_s
        self._spans.append(spans)
        self._ids_at[batch.decode_slots] = self._ids_at[batch.draw_slots] = ready_at
        return spans[-1][1]

    def busy(self, start: float, end: float) -> tuple[float, ...]:
        """The share of the time from ``start`` to ``end`` in which each stage ran a batch."""
        spans = np.clip(np.array(self._spans).reshape(-1, len(self._shares), 2), start, end)
        times = (spans[:, :, 1] - spans[:, :, 0]).sum(axis=0)
        return tuple((times / (end - start)).tolist()) if end > start else (0.0,) * len(times)
