"""The simulated device beside the checking one, on whatever batches a manager's simulation makes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from batches_by_hand import NEVER
from simulation import Simulation

from tokasaurus.planner.cost_model import fixed
from tokasaurus.planner.simulated_device import SimulatedDevice, drawn_ids, mix
from tokasaurus.protocol.messages import ForwardResult


class Both:
    """Runs each batch on both devices; answers with what the checking one says."""

    def __init__(self, checking) -> None:
        self.checking = checking
        self.simulated = SimulatedDevice(fixed(0.5), NEVER, checking.config.num_slots)
        self.drawn: dict[tuple[int, int], list[int]] = {}
        self.names: dict[int, tuple[int, int]] = {}
        self.num_forks = 0

    def __getattr__(self, name):
        return getattr(self.checking, name)

    def run(self, batch):
        expected, found = self.checking.run(batch), self.simulated.run(batch)
        assert found.number == expected.number
        assert found.device_s == 0.5
        assert (found.pooled is None) == (expected.pooled is None)
        if found.pooled is not None:
            assert len(found.pooled) == len(expected.pooled)
        assert found.cut_rows is None  # it cuts nobody: the rows are the checking one's
        others = {"number", "device_s", "pooled", "cut_rows"}
        for name in set(ForwardResult.__struct_fields__) - others:
            one, other = getattr(expected, name), getattr(found, name)
            assert (one.shape, one.dtype) == (other.shape, other.dtype), name
            is_unasked = np.isnan(one) if one.dtype == np.float32 else one == -1
            assert (
                (np.isnan(other) if one.dtype == np.float32 else other == -1) == is_unasked
            ).all()
        self._note(batch, found.token_ids.tolist())
        return expected

    def _note(self, batch, ids):
        if batch.parameters is not None:
            names = zip(
                batch.parameters.seed.tolist(), batch.parameters.sample_index.tolist(), strict=True
            )
            self.names |= dict(zip(batch.parameters.slots.tolist(), names, strict=True))
        self.num_forks += len(batch.draw_slots) - len(set(batch.draw_chunks.tolist()))
        slots = batch.decode_slots.tolist() + batch.draw_slots.tolist()
        for slot, token in zip(slots, ids, strict=True):
            self.drawn.setdefault(self.names[slot], []).append(token)


@pytest.mark.parametrize("seed", range(12))
def test_any_batch_gets_a_result_of_the_right_shape(seed):
    world = Simulation.of_seed(seed)
    world.device = both = Both(world.device)
    world.habits = dataclasses.replace(world.habits, num_requests=40)
    world.run()
    assert both.drawn
    for (request_seed, sample_index), ids in both.drawn.items():
        key = mix(np.array([request_seed], np.uint64), np.array([sample_index], np.uint64))
        assert ids == drawn_ids(key, np.arange(len(ids))).tolist()  # none repeated, none left out


def test_forks_and_preemptions_are_among_them():
    """Else the test above shows less than it says."""
    worlds = [Simulation.of_seed(seed) for seed in range(12)]
    for world in worlds:
        world.device = Both(world.device)
        world.habits = dataclasses.replace(world.habits, num_requests=40)
        world.run()
    assert sum(world.device.num_forks for world in worlds) > 10
    assert sum(world.manager.counters.num_preemptions for world in worlds) > 10
