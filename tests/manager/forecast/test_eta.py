"""When requests are said to end, against when they do."""

from __future__ import annotations

import numpy as np
import pytest
from simulation import World, make_admission, make_config, make_request, prompt

from tokasaurus.manager.forecast.eta import StepTimer


def measured(world: World, num_turns: int) -> None:
    """Turns of a second each."""
    for _ in range(num_turns):
        world.now += 0.999
        world.turn(num_results=1)


def exact_world(**changes: object) -> World:
    """A world in which all sequences are as long as max_tokens, and this is known."""
    config = make_config(admission=make_admission(predict_lengths=False), **changes)
    return World(config)


def test_there_is_no_eta_before_a_step_was_measured() -> None:
    world = exact_world()
    assert world.manager.eta() is None
    world.turn(make_request(1, prompt(5), 20))
    assert world.manager.eta() is None


def test_running_requests_end_when_their_eta_says() -> None:
    world = exact_world(scheduling_steps_ahead=1)
    world.turn(make_request(1, prompt(5), 10), make_request(2, prompt(5, 1), 20))
    measured(world, 4)
    eta = world.manager.eta()
    assert eta is not None
    assert eta.request_ids.tolist() == [1, 2]
    start = world.now
    ended: dict[int, float] = {}
    while not world.manager.idle:
        measured(world, 1)
        for index in (1, 2):
            if world.answers[index, 0].reason:
                ended.setdefault(index, world.now - start)
    assert eta.seconds.tolist() == pytest.approx([ended[1], ended[2]], abs=1.1)
    assert eta.backlog_seconds == pytest.approx(ended[2], abs=1.1)


def test_queued_requests_end_about_when_their_eta_says() -> None:
    """Two at a time, of ten tokens each: nine requests need about five rounds."""
    world = exact_world(scheduling_steps_ahead=1, num_pages=8, max_seqs_per_forward=8)
    world.turn(*[make_request(index, prompt(5, index), 12) for index in range(9)])
    measured(world, 2)
    eta = world.manager.eta()
    assert eta is not None
    assert eta.request_ids.tolist() == list(range(9))
    assert (np.diff(eta.seconds) >= 0).all()
    start = world.now
    while not world.manager.idle:
        measured(world, 1)
    assert eta.backlog_seconds == pytest.approx(world.now - start, rel=0.25)


def test_followers_count_in_the_eta_of_their_request() -> None:
    world = exact_world(scheduling_steps_ahead=1, max_tokens_per_forward=6)
    world.turn(make_request(1, prompt(30), 10, n=5))
    measured(world, 2)
    eta = world.manager.eta()
    assert eta is not None
    assert eta.request_ids.tolist() == [1]
    assert eta.seconds[0] > 10


def test_sequences_far_behind_in_the_queue_count_as_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokasaurus.manager.forecast.eta.MAX_QUEUED", 3)
    world = exact_world(scheduling_steps_ahead=1, num_pages=8)
    world.turn(*[make_request(index, prompt(5, index), 12) for index in range(20)])
    measured(world, 2)
    eta = world.manager.eta()
    assert eta is not None
    assert len(eta.request_ids) < 10
    start = world.now
    while not world.manager.idle:
        measured(world, 1)
    assert eta.backlog_seconds == pytest.approx(world.now - start, rel=0.4)


def test_idle_time_does_not_count_as_the_duration_of_a_step() -> None:
    timer = StepTimer()
    timer.absorbed(1.0, 1, False)
    timer.absorbed(1.5, 2, True)
    assert timer.seconds == 0.25
    timer.absorbed(100.0, 1, False)
    timer.absorbed(100.25, 1, False)
    assert timer.seconds == 0.25
