"""The forecast that is shown, against what happens."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from simulation import World, make_admission, make_config, make_request, prompt

from tokasaurus.protocol.commands import Pause, PauseMode
from tokasaurus.protocol.watching import MAX_BINS, Outlook, Watch

EXACT = make_admission(predict_lengths=False)  # all sequences are as long as max_tokens


def watched(**changes: object) -> World:
    world = World(make_config(admission=EXACT, scheduling_steps_ahead=1, **changes))
    world.turn(Watch(1e9))
    return world


def outlook_of(world: World) -> Outlook:
    found = world.manager.outlook()
    assert found is not None
    return found


def test_nothing_is_computed_unless_it_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(make_config())
    world.turn(make_request(1, prompt(5), 20))

    def fail(*_: object) -> None:
        raise AssertionError("an outlook was computed")

    monkeypatch.setattr("tokasaurus.manager.manager.outlook", fail)
    assert world.manager.outlook() is None
    world.turn(Watch(0.0015))
    with pytest.raises(AssertionError):
        world.manager.outlook()
    world.turn()
    world.turn()
    assert world.manager.outlook() is None  # the time is over
    world.drain()


def test_use_comes_true_step_by_step_where_lengths_are_known() -> None:
    world = watched(num_pages=64)
    world.turn(*[make_request(index, prompt(6, index), 9 + 4 * index) for index in range(5)])
    for _ in range(4):
        world.turn(num_results=1)
    seen = outlook_of(world)
    assert seen.stride == 1
    assert seen.running_pages.tolist() == seen.all_pages.tolist()
    assert seen.num_ended.sum() == 5
    used = [seen.used]
    while not world.manager.idle:
        world.turn(num_results=1)
        used.append(world.manager._running.pages.num_held)
    # The pages of a sequence are given back once its last result is there, a step later.
    expected = seen.all_pages.tolist()
    for step, pages in enumerate(expected[1:], 1):
        assert min(used[step : step + 2]) <= pages <= max(used[step - 1 : step + 1]), step


def test_the_queue_is_admitted_as_sequences_leave() -> None:
    world = watched(num_pages=8, max_seqs_per_forward=8)
    world.turn(*[make_request(index, prompt(5, index), 12) for index in range(9)])
    for _ in range(2):
        world.turn(num_results=1)
    seen = outlook_of(world)
    num_running = world.manager.gauges().num_decoding
    assert 0 < num_running < 9
    assert seen.num_admitted.sum() == 9 - num_running
    assert seen.num_ended.sum() == 9
    assert (seen.all_pages >= seen.running_pages).all()
    # No more is admitted by a step than has ended by then, or finds room now.
    room = num_running - np.cumsum(seen.num_ended) + np.cumsum(seen.num_admitted)
    assert room.max() <= num_running
    eta = world.manager.eta()
    assert eta is None or eta.backlog_seconds >= 0
    assert len(seen.all_pages) * seen.stride >= 9 / num_running * 12
    world.drain()


def test_its_size_is_bounded() -> None:
    world = watched(num_pages=4096, max_request_tokens=20_000, max_seqs_per_forward=8)
    world.turn(*[make_request(index, prompt(5, index), 15_000) for index in range(30)])
    for _ in range(3):
        world.turn(num_results=1)
    seen = outlook_of(world)
    assert len(seen.all_pages) <= MAX_BINS
    assert len(seen.all_pages) * seen.stride >= 15_000
    assert len(msgspec.msgpack.encode(seen.all_pages.tobytes())) < 2048
    assert seen.num_ended.sum() == 30


def test_sequences_far_behind_are_only_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokasaurus.manager.forecast.eta.MAX_QUEUED", 4)
    world = watched(num_pages=8, max_seqs_per_forward=8)
    world.turn(*[make_request(index, prompt(5, index), 12) for index in range(20)])
    for _ in range(2):
        world.turn(num_results=1)
    seen = outlook_of(world)
    num_begun = world.manager._running.num_begun
    assert seen.num_ended.sum() == num_begun + 4
    assert seen.num_unseen == 20 - num_begun - 4
    world.drain()


def test_an_idle_manager_and_one_that_is_paused() -> None:
    world = watched()
    seen = outlook_of(world)
    assert (seen.used, seen.all_pages.tolist(), seen.num_unseen) == (0, [0], 0)
    world.command(Pause(PauseMode.KEEP))
    assert world.manager.outlook() is None


def test_preempted_sequences_are_counted_once() -> None:
    """They wait in the queue, though they have begun."""
    greedy = make_admission(target_utilization=1000.0)
    world = World(make_config(admission=greedy, num_pages=9, scheduling_steps_ahead=1))
    world.turn(Watch(1e9), *[make_request(index, prompt(8, index), 20) for index in range(3)])
    while not world.manager.idle:
        world.turn(num_results=1)
        assert outlook_of(world).num_unseen >= 0
    assert world.manager.counters.num_preemptions > 0
