"""Random worlds get the same tokens by any schedule; ``simulation`` says what else is checked."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable

import pytest
from simulation import Simulation

from tokasaurus.manager.claims import Claims
from tokasaurus.manager.forecast.admission import AdmissionControl
from tokasaurus.manager.kv.cartridges import Cartridge
from tokasaurus.manager.preemption import Preemption
from tokasaurus.manager.sequence import Request, Sequence
from tokasaurus.manager.shares import Shares
from tokasaurus.manager.slots import IndexArray


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


def run_worlds_with_cartridges(
    first_seed: int, num_events: int, make_world: Callable[[int], Simulation]
) -> Counter[str]:
    """Runs worlds in which cartridges come and go; returns what happened in all of them."""
    worlds: list[Simulation] = []

    def remembered(seed: int) -> Simulation:
        worlds.append(make_world(seed))
        return worlds[-1]

    run_worlds(first_seed, num_events, remembered)
    counts: Counter[str] = Counter()
    for world in worlds:
        tally = world.manager._running.cartridges.tally()
        world.unload_all()
        counts += world.counts
        counts["evictions"] += tally.num_evictions
        counts["early copies"] += world.device.num_early_copies
        counts["preemptions"] += world.manager.counters.num_preemptions
        counts["hits"] += sum(
            answer.num_cached_tokens > 0 and world.num_pseudo[request_id] > 0
            for (request_id, _), answer in world.answers.items()
        )
    return counts


def test_random_worlds() -> None:
    """At least 8,000 arrivals, aborts, stops and preemptions, all together."""
    run_worlds(0, num_events=8_000)


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


def test_worlds_of_several_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients displace others' sequences, and places are given anew."""
    counts: Counter[str] = Counter()
    num_displaced_by, place_anew = Preemption._num_displaced_by, Shares.place_anew

    def counted(self: Preemption, sequence: Sequence, rows: IndexArray) -> int | None:
        num_victims = num_displaced_by(self, sequence, rows)
        counts["displaced"] += bool(num_victims)
        return num_victims

    def noted(self: Shares, priority: int, requests: Iterable[Request]) -> None:
        counts["anew"] += 1
        place_anew(self, priority, requests)

    monkeypatch.setattr(Preemption, "_num_displaced_by", counted)
    monkeypatch.setattr(Shares, "place_anew", noted)
    run_worlds(120_000, num_events=4_000, make_world=Simulation.shared_of_seed)
    assert min(counts["displaced"], counts["anew"]) > 20


def test_worlds_with_cartridges(monkeypatch: pytest.MonkeyPatch) -> None:
    """No page crosses over between a cartridge's versions, other cartridges and plain requests."""
    claims: Counter[str] = Counter()
    drop, step_aside = Claims.drop, Claims.step_aside

    def dropped(self: Claims, sequence: Sequence) -> None:
        claims["dropped"] += 1
        drop(self, sequence)

    def stepped_aside(self: Claims, sequence: Sequence, cartridge: Cartridge, now: float) -> bool:
        answer = step_aside(self, sequence, cartridge, now)
        claims["aside" if answer else "overdue"] += 1
        return answer

    monkeypatch.setattr(Claims, "drop", dropped)
    monkeypatch.setattr(Claims, "step_aside", stepped_aside)
    counts = run_worlds_with_cartridges(50_000, 10_000, Simulation.with_cartridges_of_seed)
    names = ("loads", "writes", "evictions", "early copies", "preemptions", "hits", "rejections")
    assert min(counts[name] for name in names) > 50, counts
    assert min(claims[name] for name in ("dropped", "aside", "overdue")) > 10, claims


def test_crowded_worlds_with_cartridges() -> None:
    make_world = Simulation.crowded_with_cartridges_of_seed
    counts = run_worlds_with_cartridges(740_000, 700, make_world)
    assert min(counts[name] for name in ("writes", "evictions", "preemptions")) > 10, counts


def test_worlds_with_cartridges_and_commands() -> None:
    """Cartridges outlive updates, and are written again when a cache is restored."""
    make_world = Simulation.commanded_with_cartridges_of_seed
    counts = run_worlds_with_cartridges(80_000, 20_000, make_world)
    assert min(counts[name] for name in ("loads", "writes", "evictions", "rejections")) > 50, counts


def test_worlds_with_commands() -> None:
    """Pauses, updates, released memory and the rest, in any order, with eight batches in flight."""
    run_worlds(400, num_events=3_000, make_world=Simulation.commanded_of_seed)


def test_worlds_with_lanes() -> None:
    """Worlds of all these kinds, on pipelines of two, three and five lanes."""
    run_worlds(200_000, num_events=5_000, make_world=Simulation.with_lanes_of_seed)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first_seed", range(210_000, 216_000, 1_000))
def test_many_worlds_with_lanes(first_seed: int) -> None:
    """Cases of their own, so that workers share them."""
    run_worlds(first_seed, num_events=20_000, make_world=Simulation.with_lanes_of_seed)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_worlds_of_several_clients() -> None:
    run_worlds(130_000, num_events=60_000, make_world=Simulation.shared_of_seed)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_worlds_with_cartridges() -> None:
    run_worlds_with_cartridges(60_000, 60_000, Simulation.with_cartridges_of_seed)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_crowded_worlds_with_cartridges() -> None:
    make_world = Simulation.crowded_with_cartridges_of_seed
    run_worlds_with_cartridges(750_000, 40_000, make_world)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_worlds_with_cartridges_and_commands() -> None:
    run_worlds_with_cartridges(90_000, 60_000, Simulation.commanded_with_cartridges_of_seed)


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
