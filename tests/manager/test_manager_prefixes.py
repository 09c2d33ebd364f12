"""Prompts that share beginnings: what is found in the prefix cache, and when."""

from __future__ import annotations

import pytest
from simulation import World, make_config, make_request, prompt

from tokasaurus.protocol.messages import FinishReason, StopSequence


@pytest.mark.parametrize(
    ("length", "cached"),
    [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12)],  # never the last prompt token
)
def test_a_repeated_prompt_hits(length: int, cached: int) -> None:
    world = World(make_config())
    world.finish(make_request(1, prompt(length), 3))
    world.finish(make_request(2, prompt(length), 3))
    assert world.answers[1, 0].num_cached_tokens == 0
    assert world.answers[2, 0].num_cached_tokens == cached
    assert world.device.num_prompt_tokens == 2 * length - cached


def test_a_common_beginning_hits() -> None:
    world = World(make_config())
    world.finish(make_request(1, prompt(10) + prompt(6, 1), 3))
    world.finish(make_request(2, prompt(10) + prompt(6, 2), 3))
    assert world.answers[2, 0].num_cached_tokens == 8


def test_an_answer_is_found_by_the_next_turn_of_a_conversation() -> None:
    world = World(make_config())
    world.finish(make_request(1, prompt(6), 7))
    answer = world.answers[1, 0].ids  # 13 ids, the KV of 12 was written
    world.finish(make_request(2, prompt(6) + answer + prompt(3, 1), 3))
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
    world.finish(make_request(1, prompt(9), 3))
    world.finish(make_request(2, prompt(9), 3, num_prompt_logprobs=2))
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
