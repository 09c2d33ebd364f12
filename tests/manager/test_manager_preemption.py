"""Preemption and stop strings: sequences that stand still and go on, with nothing lost."""

from __future__ import annotations

import dataclasses
import random
from unittest import mock

import numpy as np
from rows import named
from simulation import World, acknowledge, make_admission, make_config, make_request, prompt

from tokasaurus.config.slices import ManagerConfig
from tokasaurus.manager import held_slots
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.protocol.messages import FinishReason
from tokasaurus.rounding import ceil_div


def test_a_silent_server_stalls_only_sequences_that_hold_for_acknowledgements() -> None:
    world = World(make_config(stop_lag=4))
    world.turn(
        make_request(1, prompt(5), 20, hold_for_acks=True), make_request(2, prompt(5, 1), 20)
    )
    for _ in range(40):
        world.turn(num_results=2)
    assert len(world.answers[1, 0].ids) == 4
    assert world.answers[2, 0].reason is FinishReason.LENGTH
    world.turn(acknowledge(1, 3))
    for _ in range(10):
        world.turn(num_results=2)
    assert len(world.answers[1, 0].ids) == 7
    world.drain()


def test_acknowledgements_find_their_sequences_whatever_the_hash_of_names_does() -> None:
    """Many at once, in any order."""
    for factor in (held_slots._HASH_FACTOR, 0):
        check_that_acknowledgements_find_their_sequences(factor)


def check_that_acknowledgements_find_their_sequences(factor: int) -> None:
    with mock.patch.object(held_slots, "_HASH_FACTOR", factor):
        world = World(make_config(stop_lag=1, num_pages=64))
        world.turn(
            *[make_request(index, prompt(5), 6, n=2, hold_for_acks=True) for index in range(4)]
        )
        world.drain()


def test_acknowledgements_never_count_backwards() -> None:
    world = World(make_config(stop_lag=2))
    world.turn(make_request(1, prompt(5), 20, hold_for_acks=True))
    for _ in range(4):
        world.turn(num_results=2)
    world.turn(acknowledge(1, 2), acknowledge(1, 1))
    for _ in range(4):
        world.turn(num_results=2)
    assert len(world.answers[1, 0].ids) == 4
    world.drain()


def greedy(config: ManagerConfig) -> World:
    """Admits whatever fits at the moment, so that sequences compete for pages."""
    return World(dataclasses.replace(config, admission=make_admission(target_utilization=1000.0)))


def test_preemption_keeps_tokens_and_spares_the_oldest() -> None:
    world = greedy(make_config(num_pages=9, scheduling_steps_ahead=3))
    world.turn(*[make_request(index, prompt(8, index), 20) for index in range(3)])
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


def test_a_preempted_sequence_resumes_before_those_that_never_ran(monkeypatch) -> None:
    for steps_ahead in (2, 4):
        with named(steps_ahead):
            check_that_preempted_sequences_resume_first(monkeypatch, steps_ahead)


def check_that_preempted_sequences_resume_first(monkeypatch, steps_ahead: int) -> None:
    """No sequence takes the place of one before it, not even while that one's results come."""
    world = greedy(
        make_config(num_pages=7, max_seqs_per_forward=3, scheduling_steps_ahead=steps_ahead)
    )
    running = world.manager._running
    waiting: set[int] = set()  # seeds of sequences that were preempted and have tokens to come
    num_entered = 0
    preempt, enter = running.preempt, running.enter

    def watched_preempt(sequences) -> None:
        slots = running.slots
        for sequence in sequences:
            if slots.length[sequence.slot] < slots.final_length[sequence.slot]:
                waiting.add(sequence.request.message.seed)
        preempt(sequences)

    def watched_enter(starts, now) -> Int32Array:
        nonlocal num_entered
        for start in starts:
            seed = start.sequence.request.message.seed
            waiting.discard(seed)
            num_entered += 1
            assert all(seed < other for other in waiting), (seed, waiting)
        return enter(starts, now)

    monkeypatch.setattr(running, "preempt", watched_preempt)
    monkeypatch.setattr(running, "enter", watched_enter)
    # The last ones would find room for their short prompts as soon as others give way.
    lengths = [8, 8, 2, 2, 2, 2]
    world.turn(*[make_request(i, prompt(length, i), 12) for i, length in enumerate(lengths)])
    world.drain()
    assert num_entered == len(lengths) + world.manager.counters.num_preemptions > len(lengths)


def test_a_request_that_fits_alone_completes_however_small_the_cache() -> None:
    for page_size in (1, 4, 16):
        for steps_ahead in (1, 2, 5):
            check_that_requests_as_large_as_the_cache_complete(page_size, steps_ahead)


def check_that_requests_as_large_as_the_cache_complete(page_size: int, steps_ahead: int) -> None:
    longest = 31
    config = make_config(
        page_size=page_size,
        num_pages=ceil_div(longest - 1, page_size),  # exactly the longest request
        max_request_tokens=longest,
        max_tokens_per_forward=9,
        scheduling_steps_ahead=steps_ahead,
        force_preemption=True,
    )
    world = greedy(config)
    chance = random.Random(page_size)
    lengths = [chance.choice([1, 5, 15, 30]) for _ in range(8)]
    world.turn(
        *[
            make_request(index, prompt(length, index % 2), longest - length, n=2)
            for index, length in enumerate(lengths)
        ]
    )
    world.drain(max_turns=20_000)
    assert all(answer.reason is FinishReason.LENGTH for answer in world.answers.values())
    if page_size < 16:
        assert world.manager.counters.num_preemptions > 0


def test_forced_preemption_changes_no_token() -> None:
    requests = [make_request(index, prompt(5, index), 30, stream=index == 1) for index in range(3)]
    worlds = []
    for force_preemption in (False, True):
        world = World(make_config(force_preemption=force_preemption))
        world.turn(*requests)
        world.drain()
        worlds.append(world)
    calm, disturbed = worlds
    assert calm.manager.counters.num_preemptions == 0
    assert disturbed.manager.counters.num_preemptions > 2
    for name, answer in calm.answers.items():
        assert disturbed.answers[name].ids == answer.ids


def test_acknowledgements_outlive_preemption() -> None:
    world = World(make_config(force_preemption=True, stop_lag=1, num_pages=64))
    world.turn(*[make_request(index, prompt(5), 20, hold_for_acks=True) for index in range(4)])
    world.drain()
    assert world.manager.counters.num_preemptions > 0


def test_a_preempted_sequence_that_may_not_sample_yet_waits_for_the_server() -> None:
    world = World(make_config(stop_lag=2))
    world.turn(make_request(1, prompt(5), 20), make_request(2, prompt(5), 20, hold_for_acks=True))
    for _ in range(4):
        world.turn(num_results=2)
    held = world.manager._backlog.find(2, 0)
    assert held is not None
    world.manager._scheduler.preempt(np.array([held.slot]))
    world.turn(num_results=1)
    assert world.manager.gauges().num_parked == 1
    world.turn(acknowledge(2, 1))
    assert world.manager.gauges().num_parked == 0
    world.drain()


def test_a_preempted_sequence_keeps_its_number_of_acknowledged_tokens() -> None:
    world = World(make_config(stop_lag=2, scheduling_steps_ahead=1))
    world.turn(make_request(1, prompt(5), 20), make_request(2, prompt(5), 20, hold_for_acks=True))
    for _ in range(4):
        world.turn(num_results=1)
    world.turn(acknowledge(2, 2), num_results=1)
    held = world.manager._backlog.find(2, 0)
    assert held is not None
    world.manager._scheduler.preempt(np.array([held.slot]))
    for _ in range(2):
        world.turn(num_results=1)
        assert world.manager.gauges().num_parked == 0
    world.drain()


def test_prompt_logprobs_come_once_more_only_if_they_were_incomplete() -> None:
    world = World(make_config(max_tokens_per_forward=6, scheduling_steps_ahead=1))
    older = make_request(1, prompt(2), 30)
    world.turn(older, make_request(2, prompt(18, 1), 9, num_prompt_logprobs=1))
    victim = world.manager._backlog.find(2, 0)
    assert victim is not None
    world.turn(num_results=1)
    # In the middle of its prompt: all of it again.
    world.manager._scheduler.preempt(np.array([victim.slot]))
    for _ in range(9):
        world.turn(num_results=1)
    assert len(world.prompt_logprobs[2]) == 17
    num_prompt_tokens = world.device.num_prompt_tokens
    # While it decodes: its pages are found again.
    world.manager._scheduler.preempt(np.array([victim.slot]))
    world.drain()
    assert world.device.num_prompt_tokens - num_prompt_tokens <= world.config.page_size
