"""The manager's rules one by one, with a device that checks what it is told."""

from __future__ import annotations

import random
import sys
from unittest import mock

import numpy as np
import pytest
from simulation import World, make_config, make_request

from tokasaurus.config.slices import ManagerConfig
from tokasaurus.errors import ProtocolError
from tokasaurus.manager import held_slots
from tokasaurus.manager.manager import Manager
from tokasaurus.protocol.messages import (
    AbortRequest,
    Acknowledge,
    FinishReason,
    ForwardResult,
    GenerateRequest,
    StopSequence,
)

PAGE = 4  # tokens


def prompt(length: int, start: int = 0) -> list[int]:
    """Ids that differ from each other, and from those of another start."""
    return [(start + 7 * index) % 61 for index in range(length)]


def finish(world: World, request: GenerateRequest) -> None:
    """Runs a request by itself."""
    world.step(request)
    world.drain()


# --- at the door -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (make_request(1, [], 4), "prompt"),
        (make_request(1, [1], 0), "max_tokens"),
        (make_request(1, [1], 4, n=0), "n"),
        (make_request(1, prompt(60), 5), "max_tokens"),  # 65 tokens; a request may have 64
    ],
)
def test_what_can_never_run_is_refused(request_: GenerateRequest, field: str) -> None:
    world = World(make_config())
    world.step(request_)
    assert world.rejected[1].field == field
    assert world.manager.idle


def test_what_never_fits_the_cache_is_refused_and_what_just_fits_runs() -> None:
    world = World(make_config(num_pages=5))  # 20 positions; the last token needs none
    world.step(make_request(1, prompt(10), 12))
    assert "KV cache" in world.rejected[1].reason
    finish(world, make_request(2, prompt(10), 11))
    assert world.answers[2, 0].reason is FinishReason.LENGTH


def test_an_id_in_use_is_refused() -> None:
    world = World(make_config())
    world.step(make_request(1, prompt(5), 4))
    actions = world.manager.step([make_request(1, prompt(6), 4)], 0.0)
    assert "already in use" in actions.messages[0].reason
    world.batches += actions.batches
    world.drain()
    assert world.answers[1, 0].reason is FinishReason.LENGTH


# --- ends --------------------------------------------------------------------------------------------


def first_stop(request: GenerateRequest) -> int:
    """The token that the oracle generates at position 2, as a stop id."""
    world = World(make_config())
    finish(world, request)
    return world.answers[request.request_id, 0].ids[2]


def test_a_stop_id_ends_a_sequence_and_is_reported() -> None:
    stop = first_stop(make_request(1, prompt(5), 10))
    world = World(make_config(scheduling_steps_ahead=4))
    finish(world, make_request(1, prompt(5), 10, stop_token_ids=(stop,)))
    answer = world.answers[1, 0]
    assert answer.reason is FinishReason.STOP
    assert len(answer.ids) == 3
    assert answer.ids[-1] == stop
    assert world.manager.counters.num_wasted_tokens == 3  # what was planned ahead


def test_length_wins_where_the_last_token_is_a_stop_id() -> None:
    stop = first_stop(make_request(1, prompt(5), 10))
    world = World(make_config())
    finish(world, make_request(1, prompt(5), 3, stop_token_ids=(stop,)))
    assert world.answers[1, 0].reason is FinishReason.LENGTH


def test_nothing_is_planned_beyond_max_tokens() -> None:
    world = World(make_config(scheduling_steps_ahead=8))
    finish(world, make_request(1, prompt(5), 6))
    assert world.manager.counters.num_wasted_tokens == 0
    assert len(world.batches) == 6


@pytest.mark.parametrize("num_results", [0, 1, 3])
def test_abort_ends_all_samples_wherever_they_are(num_results: int) -> None:
    world = World(make_config(max_seqs_per_forward=2))
    world.step(make_request(1, prompt(9), 20, n=5))
    for _ in range(num_results):
        world.step(num_results=1)
    world.step(AbortRequest(1))
    assert all(answer.reason is FinishReason.ABORT for answer in world.answers.values())
    world.drain()


def test_ends_of_what_does_not_live_are_harmless() -> None:
    world = World(make_config())
    world.step(AbortRequest(7), num_results=1)
    finish(world, make_request(1, prompt(5), 4, n=2))
    world.step(AbortRequest(1), AbortRequest(1), StopSequence(1, 1))
    missing = Acknowledge(np.array([1, 9]), np.array([0, 0], np.int32), np.array([1, 1], np.int32))
    world.manager.step([missing, StopSequence(9, 0), StopSequence(1, 17)], 0.0)
    world.drain()


def test_the_server_ends_a_sequence() -> None:
    world = World(make_config())
    world.step(make_request(1, prompt(5), 20, n=2))
    for _ in range(4):
        world.step(num_results=1)
    world.step(StopSequence(1, 0))
    assert world.answers[1, 0].reason is FinishReason.STOP
    assert not world.answers[1, 1].reason
    world.drain()
    assert world.answers[1, 1].reason is FinishReason.LENGTH


# --- the prefix cache --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "cached"),
    [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12)],  # never the last prompt token
)
def test_a_repeated_prompt_hits(length: int, cached: int) -> None:
    world = World(make_config())
    finish(world, make_request(1, prompt(length), 3))
    finish(world, make_request(2, prompt(length), 3))
    assert world.answers[1, 0].num_cached_tokens == 0
    assert world.answers[2, 0].num_cached_tokens == cached
    assert world.device.num_prompt_tokens == 2 * length - cached


def test_a_common_beginning_hits() -> None:
    world = World(make_config())
    finish(world, make_request(1, prompt(10) + prompt(6, 1), 3))
    finish(world, make_request(2, prompt(10) + prompt(6, 2), 3))
    assert world.answers[2, 0].num_cached_tokens == 8


def test_an_answer_is_found_by_the_next_turn_of_a_conversation() -> None:
    world = World(make_config())
    finish(world, make_request(1, prompt(6), 7))
    answer = world.answers[1, 0].ids  # 13 ids, the KV of 12 was written
    finish(world, make_request(2, prompt(6) + answer + prompt(3, 1), 3))
    assert world.answers[2, 0].num_cached_tokens == 12


def test_a_prompt_is_findable_for_the_next_batch() -> None:
    world = World(make_config(max_tokens_per_forward=16, scheduling_steps_ahead=2))
    world.step(make_request(1, prompt(16), 3), make_request(2, prompt(16), 3))
    assert world.batches[0].prefill_slots.size == 1
    assert world.batches[1].prefill_starts.tolist() == [12]
    world.drain()
    assert world.answers[2, 0].num_cached_tokens == 12


def test_prompt_logprobs_take_no_hits() -> None:
    world = World(make_config())
    finish(world, make_request(1, prompt(9), 3))
    finish(world, make_request(2, prompt(9), 3, num_prompt_logprobs=2))
    assert world.answers[2, 0].num_cached_tokens == 0
    assert sorted(world.prompt_logprobs[2]) == list(range(1, 9))


def test_a_duplicate_is_swapped_from_the_next_batch_on() -> None:
    world = World(make_config(max_tokens_per_forward=8, scheduling_steps_ahead=3))
    # Batch 0 feeds all of request 1 and two tokens of request 2. Batch 1 completes the first page of
    # request 2, a duplicate that it still writes to, and feeds request 3.
    world.step(
        make_request(1, prompt(6), 1),
        make_request(2, prompt(5), 2),
        make_request(3, prompt(5, 3), 1),
    )
    (first_slot, second_slot), pages = world.batches[0].prefill_slots.tolist(), {}
    for batch in world.batches:
        columns = (batch.table_slots, batch.table_columns, batch.table_pages)
        pages[batch.number] = {
            (slot, column): page
            for slot, column, page in zip(*(array.tolist() for array in columns), strict=True)
        }
    assert world.batches[1].prefill_slots.size == 2
    duplicate = pages[0][second_slot, 0]
    assert duplicate not in pages[1].values()
    assert (second_slot, 0) not in pages[1]
    assert pages[2][second_slot, 0] == pages[0][first_slot, 0]
    world.drain()


def test_samples_compute_their_prompt_once() -> None:
    world = World(make_config(max_seqs_per_forward=8, max_tokens_per_forward=32))
    world.step(make_request(1, prompt(10), 6, n=6))
    assert world.batches[0].prefill_slots.size == 1
    assert world.batches[1].prefill_starts.tolist() == [8] * 5  # all followers at once
    world.drain()
    assert world.device.num_prompt_tokens == 10 + 5 * 2
    assert [world.answers[1, sample].num_cached_tokens for sample in range(6)] == [0] + [8] * 5


def test_samples_of_a_prompt_without_a_full_page_do_not_wait() -> None:
    world = World(make_config())
    world.step(make_request(1, prompt(4), 6, n=3))
    assert world.batches[0].prefill_slots.size == 3
    world.drain()


def test_a_follower_takes_over_where_the_leader_is_gone() -> None:
    world = World(make_config(max_tokens_per_forward=6, scheduling_steps_ahead=1))
    world.step(make_request(1, prompt(18), 4, n=3))
    world.step(StopSequence(1, 0), num_results=1)  # a third of the prompt is computed
    assert world.batches[1].prefill_starts.tolist() == [4]
    assert world.batches[1].prefill_slots.size == 1
    world.drain()
    assert world.answers[1, 1].reason is world.answers[1, 2].reason is FinishReason.LENGTH
    assert world.answers[1, 2].num_cached_tokens == 16


# --- batches -----------------------------------------------------------------------------------------


def test_a_long_prompt_is_fed_in_chunks_beside_decoding() -> None:
    world = World(make_config(max_tokens_per_forward=8, scheduling_steps_ahead=4))
    world.step(make_request(1, prompt(4), 10), make_request(2, prompt(18, 1), 3))
    sizes = [(batch.decode_slots.size, batch.prefill_lengths.tolist()) for batch in world.batches]
    assert sizes == [(0, [4, 4]), (1, [7]), (1, [7]), (2, [])]
    world.drain()


def test_the_queue_is_first_in_first_out() -> None:
    world = World(make_config(max_seqs_per_forward=2, scheduling_steps_ahead=2))
    world.step(*[make_request(index, prompt(5, index), 4) for index in range(9)])
    order: list[int] = []
    while not world.manager.idle:
        world.step(num_results=1)
        ended = [name[0] for name, answer in world.answers.items() if answer.reason]
        order += [index for index in ended if index not in order]
    assert order == sorted(order)


def test_steps_ahead_limit_the_batches_in_flight() -> None:
    world = World(make_config(scheduling_steps_ahead=3))
    world.step(make_request(1, prompt(5), 20))
    assert world.manager.num_in_flight == len(world.batches) == 3
    world.step(num_results=2)
    assert world.manager.num_in_flight == 3
    assert len(world.batches) == 5
    world.drain()


def test_results_that_do_not_belong_here_are_an_error() -> None:
    world = World(make_config())
    world.step(make_request(1, prompt(5), 6))
    first, second = world.results[0], world.results[1]
    with pytest.raises(ProtocolError, match="result of batch 1 where 0"):
        world.manager.step([second], 0.0)
    short = ForwardResult(
        *[getattr(first, name) for name in ("number",)],
        first.token_ids[:0],
        *[getattr(first, name) for name in first.__struct_fields__[2:]],
    )
    with pytest.raises(ProtocolError, match="samples 1 rows"):
        world.manager.step([short], 0.0)


# --- stop strings ------------------------------------------------------------------------------------


def acknowledge(request_id: int, count: int) -> Acknowledge:
    return Acknowledge(np.array([request_id]), np.array([0], np.int32), np.array([count], np.int32))


def test_a_silent_server_stalls_only_what_holds_for_it() -> None:
    world = World(make_config(stop_lag=4))
    world.step(
        make_request(1, prompt(5), 20, hold_for_acks=True), make_request(2, prompt(5, 1), 20)
    )
    for _ in range(40):
        world.step(num_results=2)
    assert len(world.answers[1, 0].ids) == 4
    assert world.answers[2, 0].reason is FinishReason.LENGTH
    world.step(acknowledge(1, 3))
    for _ in range(10):
        world.step(num_results=2)
    assert len(world.answers[1, 0].ids) == 7
    world.drain()


@pytest.mark.parametrize("collide", [False, True])
def test_acknowledgements_find_their_sequences(collide: bool) -> None:
    """Many at once, in any order, whatever the hash of names does."""
    factor = 0 if collide else held_slots._HASH_FACTOR
    with mock.patch.object(held_slots, "_HASH_FACTOR", factor):
        world = World(make_config(stop_lag=1, num_pages=64))
        world.step(
            *[make_request(index, prompt(5), 6, n=2, hold_for_acks=True) for index in range(4)]
        )
        world.drain()


def test_acknowledgements_never_count_backwards() -> None:
    world = World(make_config(stop_lag=2))
    world.step(make_request(1, prompt(5), 20, hold_for_acks=True))
    for _ in range(4):
        world.step(num_results=2)
    world.step(acknowledge(1, 2), acknowledge(1, 1))
    for _ in range(4):
        world.step(num_results=2)
    assert len(world.answers[1, 0].ids) == 4
    world.drain()


# --- preemption --------------------------------------------------------------------------------------


def greedy(config: ManagerConfig) -> World:
    """Admits without a reserve, so that sequences compete for pages."""
    world = World(config)
    world.manager._scheduler.reserve_tokens = 0
    return world


def test_preemption_keeps_tokens_and_spares_the_oldest() -> None:
    world = greedy(make_config(num_pages=9, scheduling_steps_ahead=3))
    world.step(*[make_request(index, prompt(8, index), 20) for index in range(3)])
    world.drain()
    counters = world.manager.counters
    assert counters.num_preemptions > 0
    # The device draws no token twice; the oldest sequence entered only once.
    entered = [
        seed
        for batch in world.batches
        if batch.parameters is not None
        for seed in batch.parameters.seed.tolist()
    ]
    assert entered.count(10_000) == 1
    assert len(entered) == 3 + counters.num_preemptions


def test_a_preempted_sequence_resumes_before_those_that_never_ran() -> None:
    world = greedy(make_config(num_pages=7, max_seqs_per_forward=2, scheduling_steps_ahead=2))
    world.step(*[make_request(index, prompt(8, index), 12) for index in range(4)])
    world.drain()
    entered = [
        seed - 10_000
        for batch in world.batches
        if batch.parameters is not None
        for seed in batch.parameters.seed.tolist()
    ]
    assert world.manager.counters.num_preemptions > 0
    assert entered[: entered.index(2)].count(1) > 1


@pytest.mark.parametrize("steps_ahead", [1, 2, 5])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_one_that_fits_alone_completes_however_small_the_cache(
    page_size: int, steps_ahead: int
) -> None:
    longest = 31
    config = make_config(
        page_size=page_size,
        num_pages=-(-(longest - 1) // page_size),  # exactly the longest request
        max_request_tokens=longest,
        max_tokens_per_forward=9,
        scheduling_steps_ahead=steps_ahead,
        force_preemption=True,
    )
    world = greedy(config)
    chance = random.Random(page_size)
    lengths = [chance.choice([1, 5, 15, 30]) for _ in range(8)]
    world.step(
        *[
            make_request(index, prompt(length, index % 2), longest - length, n=2)
            for index, length in enumerate(lengths)
        ]
    )
    world.drain(max_steps=20_000)
    assert all(answer.reason is FinishReason.LENGTH for answer in world.answers.values())
    if page_size < 16:
        assert world.manager.counters.num_preemptions > 0


def test_forced_preemption_changes_no_token() -> None:
    requests = [make_request(index, prompt(5, index), 30, stream=index == 1) for index in range(3)]
    worlds = []
    for force_preemption in (False, True):
        world = World(make_config(force_preemption=force_preemption))
        world.step(*requests)
        world.drain()
        worlds.append(world)
    calm, disturbed = worlds
    assert calm.manager.counters.num_preemptions == 0
    assert disturbed.manager.counters.num_preemptions > 2
    for name, answer in calm.answers.items():
        assert disturbed.answers[name].ids == answer.ids


def test_acknowledgements_outlive_preemption() -> None:
    world = World(make_config(force_preemption=True, stop_lag=1, num_pages=64))
    world.step(*[make_request(index, prompt(5), 20, hold_for_acks=True) for index in range(4)])
    world.drain()
    assert world.manager.counters.num_preemptions > 0


def test_a_preempted_sequence_that_may_not_sample_yet_waits_for_the_server() -> None:
    world = World(make_config(stop_lag=2))
    world.step(make_request(1, prompt(5), 20), make_request(2, prompt(5), 20, hold_for_acks=True))
    for _ in range(4):
        world.step(num_results=2)
    held = world.manager._backlog.find(2, 0)
    assert held is not None
    world.manager._running.preempt(held)
    world.step(num_results=1)
    assert world.manager.gauges().num_parked == 1
    world.step(acknowledge(2, 1))
    assert world.manager.gauges().num_parked == 0
    world.drain()


def test_prompt_logprobs_come_once_more_only_if_they_were_incomplete() -> None:
    world = World(make_config(max_tokens_per_forward=6, scheduling_steps_ahead=1))
    older = make_request(1, prompt(2), 30)
    world.step(older, make_request(2, prompt(18, 1), 9, num_prompt_logprobs=1))
    victim = world.manager._backlog.find(2, 0)
    assert victim is not None
    world.step(num_results=1)
    world.manager._running.preempt(victim)  # in the middle of its prompt: all of it again
    for _ in range(9):
        world.step(num_results=1)
    assert len(world.prompt_logprobs[2]) == 17
    num_prompt_tokens = world.device.num_prompt_tokens
    world.manager._running.preempt(victim)  # while it decodes: its pages are found again
    world.drain()
    assert world.device.num_prompt_tokens - num_prompt_tokens <= PAGE


# --- the state as a whole ----------------------------------------------------------------------------


def test_gauges_account_for_every_sequence() -> None:
    world = World(make_config(max_seqs_per_forward=3, max_tokens_per_forward=12))
    world.step(
        make_request(1, prompt(20), 5, n=3), *[make_request(i, [i], 5) for i in (2, 3, 4, 5)]
    )
    while not world.manager.idle:
        gauges = world.manager.gauges()
        living = gauges.num_queued + gauges.num_parked + gauges.num_prefilling + gauges.num_decoding
        assert living == len(world.living)
        assert gauges.num_in_flight == world.manager.num_in_flight
        assert 0 <= gauges.num_free_pages + gauges.num_evictable_pages <= gauges.num_pages
        world.step(num_results=1)
    assert world.manager.counters.num_finished == 7


def corrupt_references(world: World) -> None:
    world.manager._running.pages.pool.references[0] += 1


def corrupt_free_pages(world: World) -> None:
    world.manager._running.pages.pool.num_free -= 1


def corrupt_evictable(world: World) -> None:
    world.manager._running.pages.pool.num_evictable += 1


def corrupt_tree(world: World) -> None:
    next(world.manager._running.pages.cache.nodes()).last_used += 1000


def corrupt_table(world: World) -> None:
    slots = world.manager._running.slots
    slots.page_table[slots.order >= 0, 0] = slots.page_table[slots.order >= 0, 1]


def corrupt_known(world: World) -> None:
    slots = world.manager._running.slots
    slots.known[slots.order >= 0] += 1


def corrupt_queue(world: World) -> None:
    world.manager._backlog.pop()


def corrupt_requests(world: World) -> None:
    world.manager._backlog.requests.popitem()


@pytest.mark.parametrize(
    "corrupt",
    [
        corrupt_references,
        corrupt_free_pages,
        corrupt_evictable,
        corrupt_tree,
        corrupt_table,
        corrupt_known,
        corrupt_queue,
        corrupt_requests,
    ],
)
def test_the_invariant_check_notices(corrupt: object) -> None:
    world = World(make_config(max_seqs_per_forward=2))
    world.step(*[make_request(index, prompt(9, index), 12) for index in range(4)])
    for _ in range(3):
        world.step(num_results=1)
    corrupt(world)  # type: ignore[operator]
    with pytest.raises(ProtocolError):
        world.manager.step([], 0.0)


def count_lines_of_a_steady_step(num_sequences: int) -> int:
    """Python lines that one step executes where everybody decodes and nobody starts or ends."""
    config = make_config(
        page_size=16,
        num_pages=4 * num_sequences,
        num_slots=2 * num_sequences,
        max_seqs_per_forward=num_sequences,
        max_tokens_per_forward=8 * num_sequences,
        scheduling_steps_ahead=2,
        check_invariants=False,
    )
    manager = Manager(config)
    batches = manager.step(
        [
            make_request(index, prompt(5), 50, stream=index % 2 == 0)
            for index in range(num_sequences)
        ],
        0.0,
    ).batches
    num_lines = 0

    def trace(frame: object, event: str, argument: object) -> object:
        nonlocal num_lines
        num_lines += event == "line"
        return trace

    for number in range(6):
        num_rows = len(batches[number].decode_slots) + int(batches[number].prefill_samples.sum())
        result = ForwardResult(
            number=number,
            token_ids=np.full(num_rows, 60, np.int32),
            logprobs=np.zeros(0, np.float32),
            top_ids=np.zeros((num_rows, 0), np.int32),
            top_logprobs=np.zeros((num_rows, 0), np.float32),
            prompt_logprobs=np.zeros(0, np.float32),
            prompt_top_ids=np.zeros((0, 0), np.int32),
            prompt_top_logprobs=np.zeros((0, 0), np.float32),
            device_s=0.0,
        )
        num_lines = 0
        previous = sys.gettrace()
        sys.settrace(trace)  # type: ignore[arg-type]
        try:
            batches += manager.step([result], 0.0).batches
        finally:
            sys.settrace(previous)
    return num_lines


def test_a_steady_step_executes_no_python_per_sequence() -> None:
    assert count_lines_of_a_steady_step(16) == count_lines_of_a_steady_step(256)
