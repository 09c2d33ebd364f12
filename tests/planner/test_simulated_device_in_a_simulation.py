"""The simulated device beside the checking device, on batches of a simulation of the manager."""

from __future__ import annotations

import dataclasses

import numpy as np
from batches_by_hand import NEVER
from simulation import Simulation

from tokasaurus.planner.cost_model import fixed
from tokasaurus.planner.simulated_device import SimulatedDevice, drawn_ids, mix
from tokasaurus.protocol.messages import ForwardResult


class Both:
    """Runs each batch on both devices; returns the result of the checking one."""

    def __init__(self, checking) -> None:
        self.checking = checking
        self.simulated = SimulatedDevice(
            fixed(0.5), NEVER, checking.config.num_slots, checking.config.page_size
        )
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
        assert found.cut_rows is None  # only the checking device cuts rows
        others = {
            "number",
            "device_s",
            "pooled",
            "cut_rows",
            "num_grouped_tokens",
            "num_grouped_prefill_tokens",
            "num_recompiles",
            "waited_s",
        }
        for name in set(ForwardResult.__struct_fields__) - others:
            one, other = getattr(expected, name), getattr(found, name)
            assert (one.shape, one.dtype) == (other.shape, other.dtype), name
            assert (is_empty(one) == is_empty(other)).all(), name
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


def is_empty(values):
    """Where a result has no value because none was asked for."""
    return np.isnan(values) if values.dtype == np.float32 else values == -1


def test_results_have_the_shapes_and_tokens_that_the_manager_expects():
    num_forks = num_preemptions = 0
    for seed in range(12):
        world = Simulation.of_seed(seed)
        world.device = both = Both(world.device)
        world.habits = dataclasses.replace(world.habits, num_requests=40)
        world.run()
        assert both.drawn, f"seed {seed}"
        for (request_seed, sample_index), ids in both.drawn.items():
            key = mix(np.array([request_seed], np.uint64), np.array([sample_index], np.uint64))
            # Each token once, in order.
            assert ids == drawn_ids(key, np.arange(len(ids))).tolist(), f"seed {seed}"
        num_forks += both.num_forks
        num_preemptions += world.manager.counters.num_preemptions
    # Otherwise the runs show little.
    assert num_forks > 10
    assert num_preemptions > 10
