"""Random worlds get the same tokens by any schedule; ``simulation`` says what else is checked."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from simulation import Simulation

from tokasaurus.manager.forecast.admission import AdmissionControl
from tokasaurus.manager.sequence import Sequence


def run_worlds(
    first_seed: int,
    num_events: int,
    make_world: Callable[[int], Simulation] = Simulation.of_seed,
) -> None:
    """Runs one world after the other until this much has happened in all of them together."""
    for seed in itertools.count(first_seed):
        world = make_world(seed)
        try:
            world.run()
        except Exception as error:
            raise AssertionError(f"seed {seed}: {world.config} {world.habits}") from error
        num_events -= world.num_events
        if num_events <= 0:
            return


def test_random_worlds() -> None:
    """At least 16,000 arrivals, aborts, stops and preemptions, all together."""
    run_worlds(0, num_events=16_000)


def test_crowded_worlds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that wait for room are asked about again when there may be some."""
    num_rests = 0
    may_ask = AdmissionControl.may_ask

    def counted(self: AdmissionControl, head: Sequence | None) -> bool:
        nonlocal num_rests
        answer = may_ask(self, head)
        num_rests += not answer
        return answer

    monkeypatch.setattr(AdmissionControl, "may_ask", counted)
    run_worlds(900, num_events=1_000, make_world=Simulation.crowded_of_seed)
    assert num_rests > 500  # turns


def test_worlds_with_commands() -> None:
    """Pauses, updates, released memory and the rest, in any order, with eight batches in flight."""
    run_worlds(400, num_events=3_000, make_world=Simulation.commanded_of_seed)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first_seed", range(50_000, 54_000, 1_000))
def test_many_worlds_with_commands(first_seed: int) -> None:
    """Cases of their own, so that workers share them."""
    run_worlds(first_seed, num_events=20_000, make_world=Simulation.commanded_of_seed)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_crowded_worlds() -> None:
    run_worlds(30_000, num_events=40_000, make_world=Simulation.crowded_of_seed)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first_seed", range(10_000, 26_000, 1_000))
def test_many_random_worlds(first_seed: int) -> None:
    """Cases of their own, so that workers share them."""
    run_worlds(first_seed, num_events=20_000)
