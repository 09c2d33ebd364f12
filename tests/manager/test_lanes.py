"""Lanes of a pipeline: which sequences decode in which batch, and how prompts are spread."""

from __future__ import annotations

import numpy as np
import pytest
from simulation import World, acknowledge, make_admission, make_config, make_request, prompt

from tokasaurus.manager.lanes import Lanes
from tokasaurus.manager.slots import SlotTable
from tokasaurus.protocol.messages import AbortRequest, ForwardBatch
from tokasaurus.rounding import ceil_div


def world_of(num_lanes: int, **changes: object) -> World:
    """A world with room for everything, one more batch in flight than lanes."""
    values: dict[str, object] = {
        "num_lanes": num_lanes,
        "scheduling_steps_ahead": 2,
        "num_pages": 4096,
        "num_slots": 128,
        "max_seqs_per_forward": 64,
        "max_tokens_per_forward": 256,
        "max_request_tokens": 2048,
    }
    return World(make_config(**{**values, **changes}))


def requests(count: int, max_tokens: int = 100, length: int = 3) -> list:
    return [make_request(i, prompt(length, i), max_tokens) for i in range(count)]


def run_until_fed(world: World) -> None:
    """Until every sequence decodes, and has done so in the lanes that it stays in."""
    while world.manager.gauges().num_decoding < len(world.living):
        world.turn(num_results=1)
    next_batches(world, 4 * world.config.num_lanes)


def next_batches(world: World, count: int) -> list[ForwardBatch]:
    """The next batches that are sent, while each turn brings one result."""
    first = len(world.batches)
    while len(world.batches) < first + count:
        world.turn(num_results=1)
    return world.batches[first : first + count]


def num_tokens(batch: ForwardBatch) -> int:
    return len(batch.decode_slots) + len(batch.prefill_ids)


def sizes(batches: list[ForwardBatch]) -> list[int]:
    return [len(batch.decode_slots) for batch in batches]


@pytest.mark.parametrize("num_lanes", [2, 3, 5])
def test_each_round_serves_each_sequence_once_in_equal_parts(num_lanes: int) -> None:
    for count in (num_lanes, num_lanes + 1, 17, 40):
        world = world_of(num_lanes)
        world.turn(*requests(count))
        run_until_fed(world)
        for _ in range(3):
            slots: list[int] = []
            while len(slots) < count:
                (batch,) = next_batches(world, 1)
                assert 0 < len(batch.decode_slots) <= ceil_div(count, num_lanes)
                slots += batch.decode_slots.tolist()
            assert sorted(slots) == list(range(count))
        world.drain()


def test_a_lane_is_due_when_all_others_had_their_turns() -> None:
    world = world_of(num_lanes=5)
    world.turn(*requests(40))
    run_until_fed(world)
    world.device.distances.clear()
    next_batches(world, 50)
    assert set(world.device.distances) == {5}


def test_few_sequences_do_not_wait_for_empty_lanes() -> None:
    for count in (1, 2, 3):
        world = world_of(num_lanes=5)
        world.turn(*requests(count))
        run_until_fed(world)
        assert sizes(next_batches(world, 12)) == [1] * 12
        assert world.device.distances[-1] == count


def test_a_batch_is_in_flight_for_each_lane_that_has_something_to_do() -> None:
    for count, num_lanes in ((1, 1), (3, 3), (5, 5), (40, 5)):
        world = world_of(num_lanes=5)
        world.turn(*requests(count))
        run_until_fed(world)
        assert world.manager.num_in_flight == num_lanes - 1 + 2
    # Chunks of one prompt follow each other through the stages.
    world = world_of(num_lanes=5)
    world.turn(make_request(0, prompt(900), 5))
    assert world.manager.num_in_flight == 5 - 1 + 2


def test_lanes_that_have_lost_sequences_are_even_one_round_later() -> None:
    world = world_of(num_lanes=4)
    world.turn(*requests(40))
    run_until_fed(world)
    lane = next_batches(world, 1)[0].decode_slots.tolist()
    request_ids = [world.manager._running.slots.request_id.item(slot) for slot in lane]
    assert len(lane) == 10
    world.device.distances.clear()
    world.turn(*[AbortRequest(request_id) for request_id in request_ids[:8]])
    next_batches(world, 4)
    assert max(sizes(next_batches(world, 8))) == ceil_div(40 - 8, 4)
    # No sequence that moved has made a batch wait for its token.
    assert min(world.device.distances) >= 4


def test_a_sequence_decodes_with_those_that_decoded_in_the_batch_that_ended_its_prompt() -> None:
    world = world_of(num_lanes=4)
    world.turn(*requests(12))
    run_until_fed(world)
    world.turn(make_request(99, prompt(5, 40), 50))
    batches = next_batches(world, 12)
    (ending,) = [batch for batch in batches if len(batch.draw_slots)]
    following = batches[batches.index(ending) + 4]
    assert set(ending.draw_slots.tolist()) < set(following.decode_slots.tolist())
    assert min(world.device.distances[-12:]) >= 4


def test_of_too_many_that_are_due_those_that_have_waited_longest_decode() -> None:
    slots = SlotTable(num_slots=8, max_pages=1, page_size=4)
    slots.arrival[:6] = range(6)
    slots.last_batch[:6] = [8, 8, 8, 9, 7, 8]
    may_decode = np.arange(8) < 6
    lanes = Lanes(2, slots)
    assert lanes.due(may_decode, 10, at_once=False).nonzero()[0].tolist() == [0, 1, 4]
    assert lanes.due(may_decode, 9, at_once=False).nonzero()[0].tolist() == [4]
    assert lanes.due(may_decode, 8, at_once=False).nonzero()[0].tolist() == []
    assert lanes.due(may_decode, 8, at_once=True).nonzero()[0].tolist() == [4]


def test_the_samples_of_a_request_stay_together() -> None:
    world = world_of(num_lanes=3)
    world.turn(*[make_request(i, prompt(8, i), 60, n=6) for i in range(3)])
    run_until_fed(world)
    for batch in next_batches(world, 6):
        owners = world.manager._running.slots.request_id[batch.decode_slots]
        assert len(set(owners.tolist())) == 1
        # So that each lane reads one prompt, once for all of them.
        assert batch.group_num_decodes.tolist() == [6]


def test_a_cut_divides_one_request() -> None:
    world = world_of(num_lanes=4)
    world.turn(*[make_request(i, prompt(8, i), 60, n=5) for i in range(6)])
    run_until_fed(world)
    lanes_of: dict[int, set[int]] = {}
    for lane, batch in enumerate(next_batches(world, 4)):
        for owner in world.manager._running.slots.request_id[batch.decode_slots].tolist():
            lanes_of.setdefault(owner, set()).add(lane)
    assert len(lanes_of) == 6
    assert sum(len(lanes) - 1 for lanes in lanes_of.values()) <= 3  # a cut between two lanes each


def test_a_sequence_that_the_server_holds_up_comes_back_into_the_round() -> None:
    world = world_of(num_lanes=3, stop_lag=2)
    world.turn(*requests(6), make_request(9, prompt(3, 9), 60, hold_for_acks=True))
    for _ in range(40):
        world.turn(num_results=1)
    assert len(world.answers[9, 0].ids) == 2
    world.turn(acknowledge(9, 2))
    next_batches(world, 12)
    assert len(world.answers[9, 0].ids) > 2
    world.drain()


@pytest.mark.parametrize("num_pages", range(5, 12))
def test_no_batch_is_empty_where_all_that_could_decode_give_way(num_pages: int) -> None:
    # The first waits for the server, so the others may have to give way to themselves.
    for num_lanes in (2, 3):
        world = world_of(num_lanes, num_pages=num_pages, stop_lag=4, max_request_tokens=20)
        held = make_request(0, prompt(5), 14, hold_for_acks=True)
        world.turn(held, *(make_request(i, prompt(5, i), 14) for i in (1, 2)))
        for _ in range(40):
            world.turn(num_results=1)
        assert all(num_tokens(batch) for batch in world.batches)
        world.turn(AbortRequest(0))
        world.drain()


# --- prompts -------------------------------------------------------------------------------------


def test_a_prompt_is_spread_over_the_rounds() -> None:
    world = world_of(num_lanes=5)
    world.turn(make_request(0, prompt(1600), 5))
    world.drain()
    chunks = [len(batch.prefill_ids) for batch in world.batches if len(batch.prefill_ids)]
    assert sum(chunks) == 1600
    assert chunks[0] == max(chunks) == 1600 // (5 * 8)
    assert min(chunks[:-1]) == 16


def test_batches_are_filled_where_there_is_more_than_enough_to_feed() -> None:
    world = world_of(num_lanes=2, max_tokens_per_forward=64)
    world.turn(*requests(40, length=60))
    assert [num_tokens(batch) for batch in next_batches(world, 4)] == [64] * 4


def test_a_long_prompt_among_short_ones_makes_no_long_batch() -> None:
    world = world_of(num_lanes=4, max_seqs_per_forward=24, max_tokens_per_forward=4096)
    lengths = [20, 20, 20, 400, 20, 20, 20, 20]
    world.turn(*[make_request(i, prompt(lengths[i % 8], i), 20 + i * 7 % 40) for i in range(200)])
    next_batches(world, 100)
    assert max(len(batch.prefill_ids) for batch in next_batches(world, 200)) < 32
    world.drain()


def test_batches_without_decode_rows_keep_the_pace_of_prompts() -> None:
    world = world_of(num_lanes=5)
    world.turn(*requests(2))
    run_until_fed(world)
    world.turn(make_request(9, prompt(1500, 9), 5))
    world.manager._scheduler._admission.prefill_pace = 10
    budget = world.manager._scheduler._prompt_budget
    assert budget.tokens(1, keeps_pace=True) == budget.tokens(0, keeps_pace=True) == 2
    first = len(world.batches)
    while len(world.batches) < first + 4:
        world.turn(num_results=1)
        world.manager._scheduler._admission.prefill_pace = 10
    assert max(len(batch.prefill_ids) for batch in world.batches[first:]) == 2
    world.drain()


def test_prompts_do_not_wait_for_the_tokens_of_a_lane() -> None:
    """A sequence that decodes alone beside a prompt has a row in every fifth batch only."""
    world = world_of(num_lanes=5)
    world.turn(*requests(1))
    run_until_fed(world)
    world.turn(make_request(1, prompt(1600), 5))
    batches = next_batches(world, 30)
    fed = [batch for batch in batches if len(batch.prefill_ids)]
    assert len(fed) > 20
    assert sum(map(bool, sizes(fed))) <= ceil_div(len(fed), 5)


# --- steps ---------------------------------------------------------------------------------------


def test_a_step_is_a_round_of_the_lanes() -> None:
    for num_lanes in (1, 3, 5):
        world = world_of(num_lanes)
        world.turn(*requests(15, max_tokens=400))
        run_until_fed(world)
        next_batches(world, 100 * num_lanes)
        # One result comes in a millisecond.
        assert world.manager.statistics().step_s == pytest.approx(0.001 * num_lanes, rel=0.02)


def test_where_only_prompts_are_fed_a_step_is_a_batch_for_each_lane() -> None:
    world = world_of(num_lanes=3)
    world.turn(make_request(0, prompt(1600), 5))
    next_batches(world, 40)
    assert world.manager.gauges().num_decoding == 0
    assert world.manager.statistics().step_s == pytest.approx(0.003)


def test_the_eta_counts_rounds() -> None:
    for num_lanes in (1, 3):
        world = world_of(num_lanes, admission=make_admission(predict_lengths=False))
        world.turn(*requests(15, max_tokens=400))
        run_until_fed(world)
        next_batches(world, 100 * num_lanes)
        eta, before = world.manager.eta(), world.now
        assert eta is not None
        while world.living:
            world.turn(num_results=1)
        assert eta.seconds.max() == pytest.approx(world.now - before, rel=0.05)
