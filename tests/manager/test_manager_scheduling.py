"""Which sequences run, wait or give way: priorities, first_k, the forecast, pacing, groups."""

from __future__ import annotations

import dataclasses

import pytest
from fake_device import oracle
from simulation import World, make_admission, make_config, make_request, prompt

from tokasaurus.config.slices import AdmissionConfig
from tokasaurus.protocol.messages import AbortRequest, FinishReason, GenerateRequest, StopSequence

RESERVING = make_admission(predict_lengths=False)
OVERCOMMITTING = make_admission(target_utilization=1000.0)


def ends(world: World) -> list[int]:
    """Request ids in the order in which they end, one result at a time."""
    order: list[int] = []
    while not world.manager.idle:
        world.turn(num_results=1)
        order += [i for (i, _), a in world.answers.items() if a.reason and i not in order]
    return order


# --- priorities ----------------------------------------------------------------------------------


def test_lower_priorities_run_first() -> None:
    world = World(make_config(max_seqs_per_forward=1, scheduling_steps_ahead=1))
    priorities = {1: 0, 2: 5, 3: -2, 4: 0, 5: -2}
    world.turn(*[make_request(i, prompt(5, i), 3, priority=p) for i, p in priorities.items()])
    assert ends(world) == [3, 5, 1, 4, 2]


def test_an_urgent_request_takes_the_seat_of_a_less_important_one() -> None:
    world = World(make_config(max_seqs_per_forward=1, scheduling_steps_ahead=1))
    world.turn(*[make_request(i, prompt(5, i), 3) for i in range(3)])
    world.turn(make_request(9, prompt(5, 9), 3, priority=-1))
    assert ends(world) == [9, 0, 1, 2]
    assert world.manager.counters.num_preemptions == 1


def test_no_sequence_is_preempted_for_one_of_equal_priority() -> None:
    world = World(make_config(max_seqs_per_forward=1, scheduling_steps_ahead=1))
    world.turn(*[make_request(i, prompt(5, i), 3) for i in range(3)])
    assert ends(world) == [0, 1, 2]
    assert world.manager.counters.num_preemptions == 0


@pytest.mark.parametrize(
    "admission",
    [RESERVING, make_admission(), OVERCOMMITTING],
    ids=["reserving", "predicting", "overcommitting"],
)
def test_a_crowd_of_less_important_requests_holds_no_request_up(admission) -> None:
    for n in (1, 6):
        check_that_a_crowd_does_not_hold_up_one_of(n, admission)


def check_that_a_crowd_does_not_hold_up_one_of(n: int, admission: AdmissionConfig) -> None:
    config = make_config(
        num_pages=100,
        max_seqs_per_forward=16,
        max_tokens_per_forward=64,
        max_request_tokens=300,
        scheduling_steps_ahead=2,
        admission=admission,
    )
    world = World(config)
    world.turn(*[make_request(i, prompt(8, i), 250, priority=1000) for i in range(40)])
    for _ in range(60):
        world.turn(num_results=1)
    num_batches = len(world.batches)
    world.turn(make_request(99, prompt(30, 99), 20, n=n))
    while any(request == 99 for request, _ in world.living):
        world.turn(num_results=1)
    # In flight before it, its prompt, its tokens, and some until slots come free.
    assert len(world.batches) - num_batches <= 2 + 1 + 20 + 5
    world.turn(*[AbortRequest(i) for i in range(36)])
    world.drain()


def test_no_sequence_is_preempted_for_a_request_that_must_wait_anyway() -> None:
    """There is room for the first request of the queue; the second does not fit beside it."""
    config = make_config(num_pages=30, max_tokens_per_forward=64, admission=RESERVING)
    world = World(config)
    world.turn(make_request(1, prompt(60, 1), 4, priority=1))
    first, second = make_request(2, prompt(8, 2), 8, n=4), make_request(3, prompt(56, 3), 4)
    world.turn(first, second, num_results=1)
    while any(request == 2 for request, _ in world.living):
        assert world.manager.counters.num_preemptions == 0
        world.turn(num_results=1)
    world.drain()


def test_no_sequence_is_preempted_where_it_would_not_help() -> None:
    """The forecast has the last word where sequences of that priority might fill the cache."""
    world = World(make_config(num_pages=20, max_request_tokens=80, admission=RESERVING))
    world.turn(make_request(1, prompt(8, 1), 60))
    world.turn(make_request(2, prompt(4, 2), 8, priority=1), num_results=1)
    world.turn(make_request(3, prompt(8, 3), 60), num_results=1)
    while not world.answers[2, 0].reason:
        world.turn(num_results=1)
    assert world.manager.counters.num_preemptions == 0
    world.drain()


def test_priorities_from_minus_to_plus_a_million_are_accepted() -> None:
    limit = 10**6
    world = World(make_config())
    priorities = dict(enumerate((-limit - 1, -limit, limit, limit + 1)))
    world.turn(*[make_request(i, prompt(5), 3, priority=p) for i, p in priorities.items()])
    assert {i: rejected.field for i, rejected in world.rejected.items()} == {
        0: "priority",
        3: "priority",
    }


def test_the_least_important_sequence_is_preempted() -> None:
    """It arrived first; the important ones fit the cache by themselves."""
    world = World(make_config(num_pages=15, admission=OVERCOMMITTING))
    world.turn(make_request(1, prompt(8, 1), 20, priority=3))
    for _ in range(3):
        world.turn(num_results=1)
    world.turn(*[make_request(i, prompt(8, i), 20) for i in (2, 3)])
    world.drain()
    entered = [
        seed
        for batch in world.batches
        if batch.parameters is not None
        for seed in batch.parameters.seed.tolist()
    ]
    assert entered.count(10_001) > 1
    assert entered.count(10_002) == entered.count(10_003) == 1


# --- first_k -------------------------------------------------------------------------------------


def test_the_first_k_to_end_are_the_answer() -> None:
    world = World(make_config(num_pages=64))
    request = make_request(1, prompt(9), 40, n=6, first_k=2, stop_token_ids=(3, 5, 7, 11))
    lengths = sorted((len(world_answer), i) for i, world_answer in enumerate(expected(request)))
    world.turn(request)
    world.drain()
    reasons = [world.answers[1, sample].reason for sample in range(6)]
    assert reasons.count(FinishReason.ABORT) == 4
    finished = {sample for sample in range(6) if reasons[sample] is not FinishReason.ABORT}
    assert {len(world.answers[1, sample].ids) for sample in finished} == {
        length for length, _ in lengths[:2]
    }


def expected(request: GenerateRequest) -> list[list[int]]:
    return [oracle(request, sample).ids for sample in range(request.n)]


def test_a_stop_string_counts_when_the_server_says_so() -> None:
    world = World(make_config(stop_lag=4))
    world.turn(make_request(1, prompt(5), 30, n=3, first_k=1, hold_for_acks=True))
    world.turn(num_results=2)
    world.turn(StopSequence(1, 2))
    assert world.answers[1, 2].reason is FinishReason.STOP
    assert world.answers[1, 0].reason is world.answers[1, 1].reason is FinishReason.ABORT
    world.drain()


def test_samples_that_never_ran_are_cancelled_too() -> None:
    world = World(make_config(max_seqs_per_forward=2, num_slots=4))
    world.turn(make_request(1, prompt(5), 4, n=8, first_k=2))
    world.drain()
    assert world.num_finished[1] == 2


def test_first_k_is_at_most_n() -> None:
    world = World(make_config())
    first_ks = dict(enumerate((-1, 0, 3, 4)))
    world.turn(*[make_request(i, prompt(5), 4, n=3, first_k=k) for i, k in first_ks.items()])
    assert {i: rejected.field for i, rejected in world.rejected.items()} == {
        0: "first_k",
        3: "first_k",
    }


# --- the forecast --------------------------------------------------------------------------------


def test_a_manager_that_reserves_the_longest_never_preempts() -> None:
    for num_pages in (8, 13, 29):
        world = World(make_config(num_pages=num_pages, admission=RESERVING))
        world.turn(*[make_request(i, prompt(3 + i % 5, i), 4 + 3 * (i % 7)) for i in range(30)])
        world.drain()
        assert world.manager.counters.num_preemptions == 0, f"{num_pages} pages"


def test_known_ends_let_more_run_at_once() -> None:
    """Two of 20 tokens fit a cache of 32 if one begins when the other is nearly done."""
    world = World(make_config(num_pages=8, admission=RESERVING, scheduling_steps_ahead=1))
    world.turn(make_request(1, prompt(4, 1), 17), make_request(2, prompt(4, 2), 17))
    assert world.manager.gauges().num_decoding == 1
    num_turns = 1
    while world.manager.gauges().num_decoding < 2:
        world.turn(num_results=1)
        num_turns += 1
    # Request 2 needs 5 pages in the end, as does request 1: 8 suffice from the middle of request 1
    # on.
    assert 2 < num_turns < 16
    assert not world.answers[1, 0].reason
    world.drain()
    assert world.manager.counters.num_preemptions == 0


def test_learned_lengths_let_more_sequences_run() -> None:
    """All end after a fraction of max_tokens: soon more run than could if none did."""
    config = make_config(num_pages=32, max_request_tokens=128, max_seqs_per_forward=12)
    widths = {}
    for name, admission in (("learning", make_admission()), ("reserving", RESERVING)):
        world = World(dataclasses.replace(config, admission=admission))
        world.check_interval = 4
        stops = tuple(range(0, 61, 5))  # a fifth of all tokens
        world.turn(
            *[
                make_request(i, prompt(4, i), 100, stop_token_ids=stops, num_logprobs=-1)
                for i in range(150)
            ]
        )
        widest = []
        while not world.manager.idle:
            world.turn(num_results=1)
            widest.append(world.manager.gauges().num_decoding)
        widths[name] = sum(widest) / len(widest)
    assert widths["learning"] > 2 * widths["reserving"]


# --- pacing --------------------------------------------------------------------------------------


def test_balanced_prefill_spreads_prompts_over_steps() -> None:
    most = {}
    for greedy in (True, False):
        admission = make_admission(
            predict_lengths=False, greedy_prefill=greedy, prefill_round_up_multiple=4
        )
        world = World(
            make_config(
                num_pages=128,
                max_tokens_per_forward=64,
                max_seqs_per_forward=12,
                admission=admission,
                scheduling_steps_ahead=1,
            )
        )
        world.turn(make_request(0, prompt(4), 60))
        for _ in range(18):
            world.turn(num_results=1)
        first = len(world.batches)
        world.turn(*[make_request(i, prompt(16, i), 40) for i in range(1, 5)], num_results=1)
        world.drain()
        sizes = [int(batch.prefill_lengths.sum()) for batch in world.batches[first:]]
        assert sum(sizes) == 64
        most[greedy] = max(sizes)
        if not greedy:
            assert all(size % 4 == 0 for size in sizes)
    assert most[False] < most[True]


# --- groups --------------------------------------------------------------------------------------


def test_batches_say_which_rows_share_pages() -> None:
    world = World(make_config(num_pages=64, min_group_size=3, min_prefix_len=8))
    world.turn(make_request(1, prompt(10), 9, n=4), make_request(2, prompt(5, 1), 9))
    batch = next(batch for batch in world.batches if batch.decode_slots.size == 5)
    assert batch.group_num_decodes.tolist() == [4]
    assert batch.group_num_columns.tolist() == [2]
    first = int(batch.group_first_decodes[0])
    shared = set(batch.decode_slots[first : first + 4].tolist())
    assert shared == set(world.batches[0].draw_slots[world.batches[0].draw_chunks == 0].tolist())
    world.drain()


def test_prompts_that_begin_behind_the_same_pages_are_in_a_group_with_those_that_decode() -> None:
    world = World(make_config(num_pages=64, min_group_size=3, min_prefix_len=8))
    world.turn(make_request(1, prompt(8), 40))
    world.turn(num_results=1)
    alone = [make_request(2, prompt(9, 5), 9)]
    world.turn(*alone, *[make_request(i, prompt(8) + prompt(3, i), 9) for i in (3, 4)])
    world.drain()
    batch = next(batch for batch in world.batches if batch.prefill_slots.size == 3)
    assert batch.group_num_decodes.tolist() == [1]
    assert batch.group_first_chunks.tolist() == [1]
    assert batch.group_num_chunks.tolist() == [2]
    assert batch.prefill_starts.tolist() == [0, 8, 8]


def test_without_the_flag_there_are_no_groups() -> None:
    world = World(make_config(num_pages=64, use_groups=False))
    world.turn(make_request(1, prompt(10), 9, n=4))
    world.drain()
    assert not any(batch.group_num_decodes.size for batch in world.batches)
