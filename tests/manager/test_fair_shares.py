"""Fair shares of clients, in virtual time: see ``shared_engine``."""

from __future__ import annotations

import dataclasses
from collections import Counter

import msgspec
import numpy as np
import pytest
from shared_engine import Ask, SharedEngine
from simulation import Simulation, World, make_config, make_request, prompt

from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.slices import ManagerConfig
from tokasaurus.manager.order import first_order
from tokasaurus.manager.sequence import Request
from tokasaurus.manager.shares import Shares
from tokasaurus.planner.configuration import simulated_slices
from tokasaurus.planner.cost_model import fixed
from tokasaurus.planner.named_costs import PRESETS

H100 = PRESETS["llama-1b-h100"]


def default_config() -> ManagerConfig:
    """What an engine on a GPU has by default."""
    flags = EngineConfig.from_flags(max_num_tokens_per_request=4096)
    return simulated_slices(flags).replicas[0].manager


def small_config(**changes: object) -> ManagerConfig:
    """16 sequences at once, and pages for half of them when they are long."""
    config = make_config(
        page_size=4,
        num_pages=256,
        num_slots=24,
        max_seqs_per_forward=16,
        max_tokens_per_forward=128,
        max_request_tokens=400,
        scheduling_steps_ahead=2,
        use_groups=False,
    )
    return dataclasses.replace(config, **changes)


def crowd(client: str, at_s: float, num_requests: int, num_samples: int, longest: int) -> list[Ask]:
    """Requests for many long samples."""
    chance = np.random.default_rng(0)
    lengths = np.minimum(chance.exponential(longest, (num_requests, num_samples)) + 1, longest)
    return [Ask(at_s, client, longest // 10, tuple(row), longest) for row in lengths.astype(int)]


def test_a_small_request_is_answered_within_seconds_beside_a_crowd_of_long_samples() -> None:
    """24 requests of 256 samples: in the order of arrival, 117 s; alone, 0.01 s."""
    small = [Ask(at_s, "small", 20, (8,), 8) for at_s in (1.0, 4.0)]
    engine = SharedEngine(crowd("crowd", 0.0, 24, 256, 2048) + small, default_config(), H100)
    engine.run(client="small")
    first, second = engine.latencies("small")
    assert first < 1.2
    assert second < 1.2
    alone = SharedEngine(small, default_config(), H100)
    alone.run()
    assert max(alone.latencies("small")) < 0.1


def test_a_burst_of_small_requests_is_answered_within_seconds() -> None:
    small = [Ask(1.0, "small", 20, (8,), 8) for _ in range(50)]
    engine = SharedEngine(crowd("crowd", 0.0, 24, 256, 2048) + small, default_config(), H100)
    engine.run(client="small")
    assert max(engine.latencies("small")) < 2.0


def test_a_small_request_is_answered_within_seconds_beside_a_crowd_of_long_prompts() -> None:
    """The prompts fill every batch for 11 seconds."""
    asks = [Ask(0.0, "crowd", 380, (20,), 20) for _ in range(60)]
    asks.append(Ask(0.2, "small", 8, (4,), 4))
    config = small_config(num_pages=2048, max_tokens_per_forward=20)
    engine = SharedEngine(asks, config, fixed(0.01))
    engine.run(client="small")
    assert engine.latencies("small")[0] < 1.5


def test_two_crowds_get_equal_shares_whichever_came_first() -> None:
    asks = crowd("first", 0.0, 12, 16, 300) + crowd("second", 4.0, 12, 16, 300)
    engine = SharedEngine(asks, small_config(), fixed(0.01))
    engine.run(until_s=10.0)
    before = Counter(engine.tokens)
    engine.run(until_s=40.0)
    first, second = (engine.tokens[client] - before[client] for client in ("first", "second"))
    assert 0.8 < first / second < 1.25


def test_shares_do_not_slow_the_engine_down() -> None:
    """The crowd and the small requests together take as long as their work."""
    asks = crowd("crowd", 0.0, 4, 16, 300)
    alone = SharedEngine(asks, small_config(), fixed(0.01))
    alone.run()
    small = [Ask(0.5 * number, "small", 8, (8,), 8) for number in range(20)]
    shared = SharedEngine(asks + small, small_config(), fixed(0.01))
    shared.run()
    assert shared.now < 1.05 * alone.now


def test_no_client_starves_where_others_keep_coming() -> None:
    """New clients fill the engine all the time. A crowd gets its part as one of many clients."""
    newcomers = [Ask(0.02 * number, f"client {number}", 20, (60,), 60) for number in range(1250)]
    engine = SharedEngine(crowd("crowd", 0.0, 1, 32, 300) + newcomers, small_config(), fixed(0.01))
    num_left = []
    for until_s in (5.0, 15.0, 25.0):
        engine.run(until_s=until_s)
        num_left.append(engine.outcomes[0].num_left)
    assert sum(outcome.num_left for outcome in engine.outcomes[1:]) > 500
    assert num_left[0] > num_left[1] > num_left[2] > 0


def test_clients_share_within_a_priority_only() -> None:
    """The client with less than its share is less important, so it waits."""
    asks = crowd("crowd", 0.0, 2, 16, 300)
    small = [Ask(1.0, "small", 8, (8,), 8, priority=1), Ask(1.0, "other", 8, (8,), 8)]
    engine = SharedEngine(asks + small, small_config(), fixed(0.01))
    engine.run()
    (other,), (low,) = engine.latencies("other"), engine.latencies("small")
    assert other < 1.5
    assert low > 5.0


def test_no_sequence_gives_way_to_a_request_that_would_not_find_room() -> None:
    """The pages of all that could give way do not suffice for a request of the longest kind."""
    world = World(make_config(num_pages=16, share_wait_s=0.0, max_seqs_per_forward=12))
    world.turn(make_request(1, prompt(40), 20), make_request(2, prompt(3), 4, n=2))
    for _ in range(2):
        world.turn(num_results=1)
    world.turn(make_request(3, prompt(40, 1), 20, client="other"))
    while not world.answers[1, 0].reason:
        assert world.manager.counters.num_preemptions == 0
        world.turn(num_results=1)
    world.drain()


def test_one_client_gets_the_plans_that_the_order_of_arrival_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def by_arrival(shares: Shares, request: Request) -> None:
        del shares
        for sequence in request.sequences.values():
            sequence.order = first_order(request.message.priority) + sequence.arrival

    for make_world, seeds in (
        (Simulation.of_seed, (2, 4)),
        (Simulation.crowded_of_seed, (902, 904)),
    ):
        for seed in seeds:
            plain, shared = (make_world(seed) for _ in range(2))
            for world in (plain, shared):
                world.check_interval = 1 << 30
                with monkeypatch.context() as patch:
                    if world is plain:
                        patch.setattr(Shares, "enter", by_arrival)
                        patch.setattr(Shares, "leave", lambda shares, sequence: None)
                    world.run()
            assert len(plain.batches) == len(shared.batches)
            assert all(map(are_equal, plain.batches, shared.batches)), (make_world, seed)


def are_equal(one: object, other: object) -> bool:
    """Whether two messages say the same."""
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(are_equal, one, other))
    if isinstance(one, msgspec.Struct):
        return are_equal(msgspec.structs.astuple(one), msgspec.structs.astuple(other))
    return one == other
