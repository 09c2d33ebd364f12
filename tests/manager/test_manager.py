"""The manager's rules one by one, with a device that checks what it is told."""

from __future__ import annotations

import sys

import msgspec
import numpy as np
import pytest
from simulation import World, make_config, make_request, prompt

from tokasaurus.errors import ProtocolError
from tokasaurus.manager.manager import Manager
from tokasaurus.protocol.commands import Command, UpdateWeights
from tokasaurus.protocol.messages import (
    AbortRequest,
    Acknowledge,
    FinishReason,
    ForwardResult,
    GenerateRequest,
    Ping,
    StopSequence,
)

# --- at the door ---------------------------------------------------------------------------------


def test_a_request_that_can_never_run_is_refused() -> None:
    world = World(make_config())
    world.turn(
        make_request(1, [], 4),
        make_request(2, [1], 0),
        make_request(3, [1], 4, n=0),
        make_request(4, prompt(60), 5),  # 65 tokens; a request may have 64
    )
    assert {i: rejected.field for i, rejected in world.rejected.items()} == {
        1: "prompt",
        2: "max_tokens",
        3: "n",
        4: "max_tokens",
    }
    assert world.manager.idle


def test_a_request_larger_than_the_cache_is_refused_and_one_as_large_runs() -> None:
    world = World(make_config(num_pages=5))  # 20 positions; the last token needs none
    world.turn(make_request(1, prompt(10), 12))
    assert "KV cache" in world.rejected[1].reason
    world.finish(make_request(2, prompt(10), 11))
    assert world.answers[2, 0].reason is FinishReason.LENGTH


def test_a_request_id_in_use_is_refused() -> None:
    world = World(make_config())
    world.turn(make_request(1, prompt(5), 4))
    actions = world.manager.take_turn([make_request(1, prompt(6), 4)], 0.0)
    assert "already in use" in actions.messages[0].reason
    world.batches += actions.to_worker
    world.drain()
    assert world.answers[1, 0].reason is FinishReason.LENGTH


# --- ends ----------------------------------------------------------------------------------------


def first_stop(request: GenerateRequest) -> int:
    """The token that the oracle generates at position 2, as a stop id."""
    world = World(make_config())
    world.finish(request)
    return world.answers[request.request_id, 0].ids[2]


def test_a_stop_id_ends_a_sequence_and_is_reported() -> None:
    stop = first_stop(make_request(1, prompt(5), 10))
    world = World(make_config(scheduling_steps_ahead=4))
    world.finish(make_request(1, prompt(5), 10, stop_token_ids=(stop,)))
    answer = world.answers[1, 0]
    assert answer.reason is FinishReason.STOP
    assert len(answer.ids) == 3
    assert answer.ids[-1] == stop
    assert world.manager.counters.num_wasted_tokens == 3  # what was planned ahead


def test_length_wins_where_the_last_token_is_a_stop_id() -> None:
    stop = first_stop(make_request(1, prompt(5), 10))
    world = World(make_config())
    world.finish(make_request(1, prompt(5), 3, stop_token_ids=(stop,)))
    assert world.answers[1, 0].reason is FinishReason.LENGTH


def test_nothing_is_planned_beyond_max_tokens() -> None:
    world = World(make_config(scheduling_steps_ahead=8))
    world.finish(make_request(1, prompt(5), 6))
    assert world.manager.counters.num_wasted_tokens == 0
    assert len(world.batches) == 6


def test_abort_ends_all_samples_wherever_they_are() -> None:
    for num_results in (0, 1, 3):
        check_that_all_samples_end_with_an_abort_after(num_results)


def check_that_all_samples_end_with_an_abort_after(num_results: int) -> None:
    world = World(make_config(max_seqs_per_forward=2))
    world.turn(make_request(1, prompt(9), 20, n=5))
    for _ in range(num_results):
        world.turn(num_results=1)
    world.turn(AbortRequest(1))
    assert all(answer.reason is FinishReason.ABORT for answer in world.answers.values())
    world.drain()


def test_ending_sequences_that_do_not_live_is_harmless() -> None:
    world = World(make_config())
    world.turn(AbortRequest(7), num_results=1)
    world.finish(make_request(1, prompt(5), 4, n=2))
    world.turn(AbortRequest(1), AbortRequest(1), StopSequence(1, 1))
    missing = Acknowledge(np.array([1, 9]), np.array([0, 0], np.int32), np.array([1, 1], np.int32))
    world.manager.take_turn([missing, StopSequence(9, 0), StopSequence(1, 17)], 0.0)
    world.drain()


def test_the_server_can_stop_a_sequence() -> None:
    world = World(make_config())
    world.turn(make_request(1, prompt(5), 20, n=2))
    for _ in range(4):
        world.turn(num_results=1)
    world.turn(StopSequence(1, 0))
    assert world.answers[1, 0].reason is FinishReason.STOP
    assert not world.answers[1, 1].reason
    world.drain()
    assert world.answers[1, 1].reason is FinishReason.LENGTH


def test_the_worker_can_cut_sequences() -> None:
    """They are incomplete: the reason is LENGTH. Tokens of batches planned before are waste."""
    world = World(make_config(scheduling_steps_ahead=3))
    world.turn(make_request(1, prompt(5), 10, n=2, grammar="3"))
    world.finish(make_request(2, prompt(5), 10))
    answers = [world.answers[name] for name in ((1, 0), (1, 1), (2, 0))]
    assert [answer.reason for answer in answers] == [FinishReason.LENGTH] * 3
    assert [len(answer.ids) for answer in answers] == [3, 3, 10]
    assert world.manager.counters.num_wasted_tokens == 2 * 2


# --- batches -------------------------------------------------------------------------------------


def test_a_long_prompt_is_fed_in_chunks_beside_decoding() -> None:
    world = World(make_config(max_tokens_per_forward=8, scheduling_steps_ahead=4))
    world.turn(make_request(1, prompt(4), 10), make_request(2, prompt(18, 1), 3))
    sizes = [(batch.decode_slots.size, batch.prefill_lengths.tolist()) for batch in world.batches]
    assert sizes == [(0, [4, 4]), (1, [7]), (1, [7]), (2, [])]
    world.drain()


def test_requests_of_one_priority_end_in_order_of_arrival() -> None:
    world = World(make_config(max_seqs_per_forward=2, scheduling_steps_ahead=2))
    world.turn(*[make_request(index, prompt(5, index), 4) for index in range(9)])
    order: list[int] = []
    while not world.manager.idle:
        world.turn(num_results=1)
        ended = [name[0] for name, answer in world.answers.items() if answer.reason]
        order += [index for index in ended if index not in order]
    assert order == sorted(order)


def test_steps_ahead_limit_the_batches_in_flight() -> None:
    world = World(make_config(scheduling_steps_ahead=3))
    world.turn(make_request(1, prompt(5), 20))
    assert world.manager.num_in_flight == len(world.batches) == 3
    world.turn(num_results=2)
    assert world.manager.num_in_flight == 3
    assert len(world.batches) == 5
    world.drain()


def test_grouped_tokens_count_as_the_worker_reports_them() -> None:
    world = World(make_config())
    world.turn(make_request(1, prompt(5), 6))
    first, second = world.results[0], world.results[1]
    counts = {"num_grouped_tokens": 3, "num_grouped_prefill_tokens": 5}
    reported = (msgspec.structs.replace(first, **counts), second)
    world.manager.take_turn([*reported], 0.0)
    assert world.manager.counters.num_grouped_tokens == 3
    assert world.manager.counters.num_grouped_prefill_tokens == 5


def test_results_of_other_batches_are_an_error() -> None:
    world = World(make_config())
    world.turn(make_request(1, prompt(5), 6))
    first, second = world.results[0], world.results[1]
    with pytest.raises(ProtocolError, match="result of batch 1 where 0"):
        world.manager.take_turn([second], 0.0)
    short = ForwardResult(
        *[getattr(first, name) for name in ("number",)],
        first.token_ids[:0],
        *[getattr(first, name) for name in first.__struct_fields__[2:]],
    )
    with pytest.raises(ProtocolError, match="samples 1 rows"):
        world.manager.take_turn([short], 0.0)


# --- the state as a whole ------------------------------------------------------------------------


def test_gauges_account_for_every_sequence() -> None:
    world = World(make_config(max_seqs_per_forward=3, max_tokens_per_forward=12))
    world.turn(
        make_request(1, prompt(20), 5, n=3), *[make_request(i, [i], 5) for i in (2, 3, 4, 5)]
    )
    while not world.manager.idle:
        gauges = world.manager.gauges()
        living = gauges.num_queued + gauges.num_parked + gauges.num_prefilling + gauges.num_decoding
        assert living == len(world.living)
        assert gauges.num_in_flight == world.manager.num_in_flight
        assert 0 <= gauges.num_free_pages + gauges.num_evictable_pages <= gauges.num_pages
        world.turn(num_results=1)
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
    world = World(make_config(max_seqs_per_forward=2, check_invariants=True))
    world.turn(*[make_request(index, prompt(9, index), 12) for index in range(4)])
    for _ in range(3):
        world.turn(num_results=1)
    corrupt(world)  # type: ignore[operator]
    with pytest.raises(ProtocolError):
        world.manager.take_turn([], 0.0)


def count_lines_of_a_steady_turn(num_sequences: int) -> int:
    """Python lines that one turn executes where all sequences decode and none starts or ends."""
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
    batches = manager.take_turn(
        [
            make_request(index, prompt(5), 50, stream=index % 2 == 0)
            for index in range(num_sequences)
        ],
        0.0,
    ).to_worker
    num_lines = 0

    def trace(frame: object, event: str, argument: object) -> object:
        nonlocal num_lines
        num_lines += event == "line"
        return trace

    for number in range(6):
        num_rows = len(batches[number].decode_slots) + len(batches[number].draw_slots)
        result = ForwardResult(
            number=number,
            token_ids=np.full(num_rows, 60, np.int32),
            logprobs=np.zeros(0, np.float32),
            top_ids=np.zeros((num_rows, 0), np.int32),
            top_logprobs=np.zeros((num_rows, 0), np.float32),
            prompt_logprobs=np.zeros(0, np.float32),
            prompt_ranks=np.zeros(0, np.int32),
            prompt_top_ids=np.zeros((0, 0), np.int32),
            prompt_top_logprobs=np.zeros((0, 0), np.float32),
            device_s=0.0,
        )
        num_lines = 0
        previous = sys.gettrace()
        sys.settrace(trace)  # type: ignore[arg-type]
        try:
            batches += manager.take_turn([result], 0.0).to_worker
        finally:
            sys.settrace(previous)
    return num_lines


def test_a_steady_step_executes_no_python_per_sequence() -> None:
    assert count_lines_of_a_steady_turn(16) == count_lines_of_a_steady_turn(256)


# --- whether it works ----------------------------------------------------------------------------


def test_a_ping_is_answered_with_statistics_and_changes_nothing() -> None:
    world = World(make_config())
    world.turn(make_request(1, prompt(5), 4))
    before = msgspec.structs.asdict(world.manager.statistics())
    actions = world.manager.take_turn([Ping()], world.now)
    assert actions.to_worker == []
    assert [msgspec.structs.asdict(message) for message in actions.messages] == [before]


def test_the_batch_that_the_worker_must_answer_next_is_known() -> None:
    world = World(make_config())
    assert world.manager.awaited_batch is None
    world.turn(make_request(1, prompt(5), 4))
    assert world.manager.awaited_batch == world.batches[0].number
    world.drain()
    assert world.manager.awaited_batch is None
    world.turn(Command(1, UpdateWeights(1, ("a.safetensors",))))
    assert not world.manager.at_rest
    assert world.manager.awaited_batch is None
