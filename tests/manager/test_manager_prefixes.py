"""Prompts that share beginnings: what is found in the prefix cache, and when."""

from __future__ import annotations

from simulation import World, make_admission, make_config, make_request, prompt

from tokasaurus.protocol.commands import Command, FlushCache
from tokasaurus.protocol.messages import (
    AbortRequest,
    FinishReason,
    Pooling,
    StopSequence,
)


def test_a_repeated_prompt_is_found_up_to_its_last_token() -> None:
    expected = {3: 0, 4: 0, 5: 4, 8: 4, 9: 8, 12: 8, 13: 12}  # by length
    found = {}
    for length in expected:
        world = World(make_config())
        world.finish(make_request(1, prompt(length), 3))
        world.finish(make_request(2, prompt(length), 3))
        assert world.answers[1, 0].num_cached_tokens == 0
        found[length] = world.answers[2, 0].num_cached_tokens
        # Of a last page that is cached and full, all but the last token is copied.
        reused = found[length] if length % 4 else length - 1
        assert world.device.num_prompt_tokens == 2 * length - reused
        assert world.manager.statistics().num_cached_tokens == reused
    assert found == expected


def test_the_same_prompt_many_times_is_fed_once_and_then_by_its_last_token() -> None:
    """In the second batch, and not one request a batch."""
    world = World(make_config(max_seqs_per_forward=8, num_slots=8, max_tokens_per_forward=32))
    world.turn(*(make_request(i, prompt(16), 6) for i in range(1, 7)))
    first, second = world.batches[:2]
    assert first.prefill_slots.size == 1
    assert second.prefill_starts.tolist() == [15] * 5
    assert second.early_copy_sources.size == 5
    assert len(set(second.early_copy_sources.tolist())) == 1
    assert len(set(second.early_copy_targets.tolist())) == 5
    world.drain()
    assert world.device.num_prompt_tokens == 16 + 5


def test_a_page_that_is_copied_is_not_given_out_in_the_same_batch() -> None:
    """Of all cached pages it was used least recently, so it would be evicted first."""
    world = World(make_config(num_pages=6))
    world.finish(make_request(1, prompt(16), 1))
    world.finish(make_request(2, prompt(8, 1), 1))
    world.finish(make_request(3, prompt(16), 1))
    (batch,) = (each for each in world.batches if each.early_copy_sources is not None)
    assert batch.prefill_starts.tolist() == [15]
    assert batch.table_pages.size == 4
    assert not set(batch.early_copy_sources.tolist()) & set(batch.table_pages.tolist())


def test_a_prompt_of_all_pages_is_repeated() -> None:
    """No page is left to copy its last one to, so that page is computed again."""
    world = World(make_config(num_pages=4))
    for i in (1, 2, 3):
        world.finish(make_request(i, prompt(16), 1))
        assert world.answers[i, 0].num_cached_tokens == (12 if i > 1 else 0)


def test_a_common_beginning_is_found_in_the_cache() -> None:
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
    world.turn(make_request(1, prompt(16), 3), make_request(2, prompt(16), 3))
    assert world.batches[0].prefill_slots.size == 1
    assert world.batches[1].prefill_starts.tolist() == [15]
    world.drain()
    assert world.answers[2, 0].num_cached_tokens == 12


def test_prompt_logprobs_take_no_hits() -> None:
    world = World(make_config())
    world.finish(make_request(1, prompt(9), 3))
    world.finish(make_request(2, prompt(9), 3, num_prompt_logprobs=2))
    assert world.answers[2, 0].num_cached_tokens == 0
    assert sorted(world.prompt_logprobs[2]) == list(range(1, 9))


def test_a_duplicate_page_is_replaced_from_the_next_batch_on() -> None:
    world = World(make_config(max_tokens_per_forward=8, scheduling_steps_ahead=3))
    # Batch 0 feeds all of request 1 and two tokens of request 2. Batch 1 completes the first page
    # of request 2, a duplicate that it still writes to, and feeds request 3. (What needs the
    # logprobs of a prompt computes all of it.)
    world.turn(
        make_request(1, prompt(6), 1),
        make_request(2, prompt(5), 2, num_prompt_logprobs=0),
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


def test_samples_fork_from_one_prompt() -> None:
    for length in (2, 4, 8, 10):  # with and without full pages and a partial one
        check_that_samples_fork_from_a_prompt_of(length)


def check_that_samples_fork_from_a_prompt_of(length: int) -> None:
    world = World(make_config(max_seqs_per_forward=8, max_tokens_per_forward=10))
    world.turn(make_request(1, prompt(length), 6, n=6))
    first, second = world.batches[:2]
    assert first.prefill_slots.size == 1
    assert first.draw_slots.size == 6
    assert first.copy_targets.size == (5 if length % 4 else 0)
    assert second.decode_slots.size == 6
    world.drain()
    assert world.device.num_prompt_tokens == length
    cached = (length - 1) // 4 * 4
    assert [world.answers[1, sample].num_cached_tokens for sample in range(6)] == [0] + [cached] * 5


def test_samples_that_find_no_room_fork_later_from_one_of_them() -> None:
    world = World(make_config(max_seqs_per_forward=3, num_slots=3, scheduling_steps_ahead=1))
    world.turn(make_request(1, prompt(10), 4, n=8))
    assert world.batches[0].draw_slots.size == 3
    world.drain()
    # Three at once each time: two more leaders feed what is left of the prompt behind its full
    # pages.
    assert world.device.num_prompt_tokens == 10 + 2 * 2


def test_samples_fork_from_a_prompt_that_was_fed_in_chunks() -> None:
    world = World(make_config(max_tokens_per_forward=8))
    world.turn(make_request(1, prompt(19), 4, n=4))
    world.drain()
    assert world.device.num_prompt_tokens == 19


def test_an_older_request_is_not_overtaken_by_forks() -> None:
    world = World(make_config(max_seqs_per_forward=4, num_slots=4, max_tokens_per_forward=20))
    world.turn(make_request(1, prompt(6), 3), make_request(2, prompt(6, 2), 9, priority=1, n=4))
    assert world.batches[0].draw_slots.size == 4  # request 1 and three of request 2
    world.turn(make_request(3, prompt(6, 4), 3), num_results=0)
    for _ in range(30):
        world.turn(num_results=1)
        if world.answers[3, 0].reason:
            break
    assert not world.answers[2, 3].reason, "a fork of lower priority ran before request 3"
    world.drain()


def test_separate_requests_wait_for_common_pages() -> None:
    world = World(make_config(max_tokens_per_forward=24, scheduling_steps_ahead=2))
    common = prompt(9)
    world.turn(*[make_request(index, common + prompt(3, index), 5) for index in range(1, 5)])
    assert world.batches[0].prefill_slots.size == 1
    assert world.batches[1].prefill_starts.tolist() == [8] * 3
    world.drain()
    assert world.device.num_prompt_tokens == 12 + 3 * 4


def test_requests_without_a_common_page_do_not_wait() -> None:
    world = World(make_config(max_tokens_per_forward=24))
    world.turn(
        make_request(1, prompt(3) + prompt(5, 1), 5), make_request(2, prompt(3) + prompt(5, 2), 5)
    )
    assert world.batches[0].prefill_slots.size == 2
    world.drain()


def test_a_waiting_request_goes_on_where_the_computing_one_is_gone() -> None:
    world = World(make_config(max_tokens_per_forward=6, scheduling_steps_ahead=1))
    world.turn(make_request(1, prompt(18), 4), make_request(2, prompt(18), 4))
    assert world.batches[0].prefill_slots.size == 1
    world.turn(AbortRequest(1), num_results=1)
    world.drain()
    assert world.answers[2, 0].reason is FinishReason.LENGTH
    assert world.device.num_prompt_tokens == 6 + 18 - 4


def test_an_urgent_request_does_not_wait_for_pages_of_a_less_important_one() -> None:
    world = World(make_config(max_tokens_per_forward=6, scheduling_steps_ahead=1))
    world.turn(make_request(1, prompt(18), 4))
    world.turn(make_request(2, prompt(18), 4, priority=-1), num_results=1)
    assert world.batches[1].prefill_slots.size == 1
    world.drain()


def test_a_follower_takes_over_where_the_leader_is_gone() -> None:
    world = World(make_config(max_tokens_per_forward=6, scheduling_steps_ahead=1))
    world.turn(make_request(1, prompt(18), 4, n=3))
    world.turn(StopSequence(1, 0), num_results=1)  # a third of the prompt is computed
    assert world.batches[1].prefill_starts.tolist() == [4]
    assert world.batches[1].prefill_slots.size == 1
    world.drain()
    assert world.answers[1, 1].reason is world.answers[1, 2].reason is FinishReason.LENGTH
    assert world.answers[1, 2].num_cached_tokens == 16


def test_urgent_requests_share_what_a_less_important_one_waits_to_compute() -> None:
    """The claim on a page goes to the first in the queue, even if it arrives later."""
    world = World(make_config(num_pages=64, max_tokens_per_forward=12, scheduling_steps_ahead=1))
    world.turn(make_request(0, prompt(21), 4, priority=5))
    urgent = [make_request(i, prompt(21) + prompt(3, i), 4) for i in range(1, 6)]
    world.turn(*urgent, num_results=1)
    world.drain()
    # Once by the less important one as far as it got, once by the first urgent one.
    assert world.device.num_prompt_tokens <= 2 * 24 + 5 * 4 + 12


def test_many_that_wait_for_pages_are_parked_and_woken_in_portions() -> None:
    num_requests = 700
    world = World(
        make_config(
            num_pages=256,
            max_seqs_per_forward=24,
            num_slots=48,
            max_tokens_per_forward=48,
            scheduling_steps_ahead=1,
        )
    )
    world.check_interval = 50
    world.turn(*[make_request(i, prompt(21) + prompt(3, i), 2) for i in range(num_requests)])
    assert world.manager.gauges().num_queued >= num_requests - 1  # woken again, for the next plan
    assert world.batches[0].prefill_slots.size == 1
    world.drain()


def test_a_sequence_that_wakes_up_in_a_plan_keeps_its_place_in_the_queue() -> None:
    """A claim that moves on in a plan wakes a sequence that goes before others in that plan."""
    config = make_config(
        num_pages=12, scheduling_steps_ahead=1, admission=make_admission(predict_lengths=False)
    )
    world = World(config)
    world.turn(make_request(0, prompt(4, 5), 29))
    # The forecast refuses 1, which 2 waits for; 3 is behind both.
    world.turn(
        make_request(1, prompt(9), 28),
        make_request(2, prompt(9), 4),
        make_request(3, prompt(4, 9), 4),
        num_results=1,
    )
    assert world.manager.gauges().num_parked == 1
    # It computes the pages that 1 and 2 begin with in any case.
    urgent = make_request(4, prompt(8), 1, priority=-1, num_prompt_logprobs=0)
    world.turn(urgent)
    while not any(
        urgent.seed in batch.parameters.seed for batch in world.batches if batch.parameters
    ):
        world.turn(num_results=1)
    world.turn(AbortRequest(0), num_results=1)
    world.drain()
    assert [world.answers[index, 0].reason for index in (1, 2, 3)] == [FinishReason.LENGTH] * 3


def test_a_sequence_that_waits_for_a_refused_one_wakes_up_with_its_first_chunk() -> None:
    config = make_config(
        num_pages=42,
        max_tokens_per_forward=21,
        scheduling_steps_ahead=1,
        admission=make_admission(predict_lengths=False),
    )
    world = World(config)
    world.turn(make_request(1, prompt(4), 36), *(make_request(i, [i], 32) for i in (4, 5, 6)))
    # There is no room for the second one; the third would compute the same pages.
    world.turn(make_request(2, prompt(16, 1), 32), make_request(3, prompt(16, 1), 8), num_results=1)
    assert world.manager.gauges().num_parked == 1
    # More of others' tokens in a batch: the prompt that was to be fed at once comes in two chunks.
    urgent = (make_request(i, [i], 12, priority=-1) for i in (7, 8, 9))
    world.turn(*urgent, num_results=1)
    world.turn(AbortRequest(1), num_results=1)
    assert world.batches[-1].prefill_lengths.tolist() == [15]
    assert world.manager.gauges().num_parked == 0
    world.drain()
    assert world.answers[3, 0].num_cached_tokens == 12


def test_a_flush_frees_cached_pages_without_a_holder() -> None:
    world = World(make_config())
    world.finish(make_request(1, prompt(13), 3))
    world.turn(Command(9, FlushCache()))
    assert (world.command_answers[9].num_pages, world.command_answers[9].num_tokens) == (3, 12)
    assert world.manager.gauges().num_free_pages == world.config.num_pages
    world.finish(make_request(2, prompt(13), 3))
    assert world.answers[2, 0].num_cached_tokens == 0
    world.finish(make_request(3, prompt(13), 3))
    assert world.answers[3, 0].num_cached_tokens == 12


def test_a_flush_leaves_running_sequences_their_pages() -> None:
    """Their pages stay findable, and a later flush takes them."""
    world = World(make_config())
    world.finish(make_request(1, prompt(9, 5), 2))
    world.turn(make_request(2, prompt(9), 12))
    world.turn(Command(0, FlushCache()), num_results=1)
    assert world.command_answers[0].num_pages == 2
    world.turn(make_request(3, prompt(9), 2))
    world.drain()
    assert world.answers[3, 0].num_cached_tokens == 8
    world.turn(Command(1, FlushCache()), Command(2, FlushCache()))
    assert world.command_answers[1].num_pages > 0
    assert world.command_answers[2].num_pages == 0


def test_only_a_mean_computes_the_whole_prompt() -> None:
    num_computed = {}
    for pooling in (Pooling.MEAN, Pooling.LAST):
        world = World(make_config(max_tokens_per_forward=5))
        world.finish(make_request(1, prompt(13), 1))
        before = world.device.num_prompt_tokens
        world.finish(make_request(2, prompt(13), 1, pooling=pooling))
        assert 2 in world.pooled
        num_computed[pooling] = world.device.num_prompt_tokens - before
    assert num_computed == {Pooling.MEAN: 13, Pooling.LAST: 1}


def test_a_pooled_request_has_one_sample_of_one_token() -> None:
    world = World(make_config())
    world.turn(make_request(1, prompt(5), 2, pooling=Pooling.MEAN))
    world.turn(make_request(2, prompt(5), 1, n=2, pooling=Pooling.LAST))
    assert sorted(world.rejected) == [1, 2]
