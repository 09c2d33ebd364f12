"""Commands one by one, and in company; ``simulation`` checks every turn of what happens here."""

from __future__ import annotations

import numpy as np
import pytest
from fake_device import BAD_FILES, GOOD_FILES
from simulation import World, acknowledge, make_config, make_request, prompt

from tokasaurus.errors import EngineError, ProtocolError
from tokasaurus.manager.controls import MAX_WEIGHTS_VERSION, TIME_LIMITS_S
from tokasaurus.protocol.commands import (
    AbortAll,
    CommandDone,
    CommandFailed,
    ControlDone,
    FlushCache,
    Pause,
    PauseMode,
    ReleaseMemory,
    RestoreMemory,
    Resume,
    UpdateWeights,
)
from tokasaurus.protocol.messages import (
    AbortRequest,
    Acknowledge,
    FinishReason,
    StopSequence,
)

KEEP, ABORT, DRAIN = Pause(PauseMode.KEEP), Pause(PauseMode.ABORT), Pause(PauseMode.DRAIN)
RELEASE_ALL, RESTORE_ALL = ReleaseMemory(True, True), RestoreMemory(True, True)


def update(version: int, files: tuple[str, ...] = GOOD_FILES) -> UpdateWeights:
    return UpdateWeights(version, files)


def busy_world(**changes: object) -> World:
    """Two sequences decode, a third one waits for a seat; three batches are in flight."""
    world = World(make_config(max_seqs_per_forward=2, **changes))
    world.turn(*[make_request(index, prompt(9, index), 20) for index in (1, 2, 3)])
    for _ in range(3):
        world.turn(num_results=1)
    assert world.manager.num_in_flight == 3
    return world


def land_all(world: World) -> None:
    """Lets everything come back that is in flight, and what follows from it."""
    for _ in range(200):
        if not world.results:
            return
        world.turn(num_results=1)
    raise AssertionError("batches are planned without end")


def answer_of(world: World, command_id: int) -> CommandDone:
    answer = world.command_answers[command_id]
    assert isinstance(answer, CommandDone), answer
    return answer


def failure_of(world: World, command_id: int) -> CommandFailed:
    answer = world.command_answers[command_id]
    assert isinstance(answer, CommandFailed), answer
    return answer


# --- pauses --------------------------------------------------------------------------------------


def test_a_pause_that_keeps_is_done_when_no_batch_is_in_flight() -> None:
    world = busy_world()
    pause = world.command(KEEP)
    for _ in range(3):
        assert pause not in world.command_answers
        world.turn(num_results=1)
    assert answer_of(world, pause).num_sequences == 0
    assert world.manager.at_rest
    assert not world.manager.idle
    assert not any(answer.reason for answer in world.answers.values())
    world.command(Resume())
    world.drain()
    assert world.manager.counters.num_preemptions == 2


def test_tokens_in_flight_count_though_their_sequences_were_preempted() -> None:
    world = World(make_config())
    world.turn(make_request(1, prompt(9), 20, stream=True))
    world.turn(num_results=1)
    world.command(KEEP)
    land_all(world)
    assert len(world.answers[1, 0].ids) == 4
    world.command(Resume())
    world.drain()


def test_a_pause_that_aborts_ends_all_with_their_tokens() -> None:
    world = busy_world()
    pause = world.command(ABORT)
    ends = {name[0]: (answer.reason, len(answer.ids)) for name, answer in world.answers.items()}
    abort = FinishReason.ABORT
    assert ends == {1: (abort, 3), 2: (abort, 3), 3: (abort, 0)}
    assert pause not in world.command_answers
    land_all(world)
    assert answer_of(world, pause).num_sequences == 3
    world.check_empty()


def test_a_drain_lets_begun_sequences_end_and_no_other_begin() -> None:
    world = busy_world()
    pause = world.command(DRAIN)
    world.turn(make_request(4, prompt(5), 4, priority=-5))
    land_all(world)
    assert answer_of(world, pause).num_sequences == 0
    assert {name[0] for name in world.living} == {3, 4}
    assert world.manager.gauges().num_parked == 2
    world.command(Resume())
    world.drain()


def test_a_drain_lets_no_sample_fork() -> None:
    world = World(make_config(max_seqs_per_forward=2))
    world.turn(make_request(1, prompt(9), 6, n=4))
    pause = world.command(DRAIN)
    land_all(world)
    assert len(world.living) == 2
    answer_of(world, pause)
    world.command(Resume())
    world.drain()


def test_a_begun_sequence_does_not_wait_for_the_page_of_one_that_may_not_begin() -> None:
    """The urgent request claims the page that the preempted one must compute again."""
    world = World(make_config(num_pages=5, page_size=4))
    world.turn(make_request(1, prompt(9), 8))
    world.turn(num_results=1)
    world.command(KEEP)
    land_all(world)
    world.command(FlushCache())
    world.turn(make_request(2, prompt(9), 3, priority=-1))
    drain = world.command(DRAIN)
    land_all(world)
    answer_of(world, drain)
    assert list(world.living) == [(2, 0)]
    world.command(Resume())
    world.drain()


def test_requests_that_come_in_a_pause_wait() -> None:
    for mode in PauseMode:
        world = World(make_config())
        world.command(Pause(mode))
        num_batches = len(world.batches)
        world.turn(make_request(1, prompt(9), 4))
        assert len(world.batches) == num_batches, mode
        world.command(Resume())
        world.drain()


def test_aborts_stops_and_acknowledgements_work_in_a_pause() -> None:
    world = World(make_config(stop_lag=2))
    world.turn(*[make_request(i, prompt(9, i), 12, hold_for_acks=True, n=1) for i in (1, 2, 3)])
    for _ in range(3):
        world.turn(num_results=1)
    world.command(KEEP)
    land_all(world)
    world.turn(AbortRequest(1), StopSequence(2, 0), acknowledge(3, 2))
    assert world.answers[1, 0].reason is FinishReason.ABORT
    assert world.answers[2, 0].reason is FinishReason.STOP
    assert world.manager.gauges().num_queued == 1
    world.command(Resume())
    world.drain()


def test_a_pause_during_a_pause_changes_its_mode() -> None:
    world = busy_world()
    world.command(KEEP)
    land_all(world)
    drain = world.command(DRAIN)
    assert drain not in world.command_answers
    land_all(world)
    answer_of(world, drain)
    assert list(world.living) == [(3, 0)]
    abort = world.command(ABORT)
    assert answer_of(world, abort).num_sequences == 1
    world.check_empty()
    assert world.manager.statistics().paused


def test_a_resume_cancels_a_drain_and_both_are_answered() -> None:
    world = busy_world()
    drain, resume = world.command(DRAIN), world.command(Resume())
    assert "resumed" in failure_of(world, drain).reason
    answer_of(world, resume)
    assert not world.manager.statistics().paused
    world.drain()


def test_a_pause_that_keeps_cancels_a_drain() -> None:
    world = busy_world()
    drain, keep = world.command(DRAIN), world.command(KEEP)
    assert "another pause" in failure_of(world, drain).reason
    land_all(world)
    answer_of(world, keep)
    assert len(world.living) == 3
    world.command(Resume())
    world.drain()


def test_a_pause_that_aborts_finishes_a_drain() -> None:
    world = busy_world()
    drains = [world.command(DRAIN), world.command(DRAIN)]
    abort = world.command(ABORT)
    land_all(world)
    assert world.done == [*drains, abort]


def test_a_resume_waits_for_a_pause_that_is_almost_done() -> None:
    world = busy_world()
    keep, resume = world.command(KEEP), world.command(Resume())
    assert not world.command_answers
    for _ in range(3):
        world.turn(num_results=1)
    assert world.done == [keep, resume]
    world.drain()


def test_a_resume_without_a_pause_is_done_at_once() -> None:
    world = busy_world()
    answer_of(world, world.command(Resume()))
    world.drain()


def test_abort_all_ends_everything_at_once_and_nothing_later() -> None:
    world = busy_world()
    world.command(update(1))
    abort = world.make_command(AbortAll())
    world.turn(abort, make_request(9, prompt(5), 4))
    assert answer_of(world, abort.command_id).num_sequences == 3
    assert list(world.living) == [(9, 0)]
    world.drain()
    assert world.answers[9, 0].reason is FinishReason.LENGTH


def test_a_pause_that_aborts_spares_requests_that_come_after_it() -> None:
    world = busy_world()
    world.command(update(1))  # holds it up
    world.turn(world.make_command(ABORT), make_request(9, prompt(5), 4))
    land_all(world)
    assert list(world.living) == [(9, 0)]
    world.command(Resume())
    world.drain()
    assert world.answers[9, 0].reason is FinishReason.LENGTH


# --- weights -------------------------------------------------------------------------------------


def test_running_sequences_go_on_after_an_update_with_the_new_weights() -> None:
    world = World(make_config())
    world.turn(make_request(1, prompt(9), 12, num_logprobs=1, n=2))
    world.turn(num_results=1)
    command = world.command(update(5))
    land_all(world)
    assert answer_of(world, command).weights_version == 5
    assert world.manager.statistics().weights_version == 5
    world.drain()
    for index in range(2):
        assert world.answers[1, index].weights_versions == [0] * 4 + [5] * 8
        assert world.answers[1, index].num_messages == 1  # with a row for each version


def test_a_stream_has_rows_of_one_version_each() -> None:
    world = World(make_config())
    world.turn(make_request(1, prompt(9), 12, stream=True))
    world.turn(num_results=1)
    for version in (1, 2, 3):
        world.command(update(version))
        land_all(world) if version == 3 else [world.turn(num_results=1) for _ in range(4)]
    world.drain()
    versions = world.answers[1, 0].weights_versions
    assert versions[0] == 0
    assert versions[-1] == 3


def test_nothing_is_planned_behind_an_update() -> None:
    world = busy_world()
    num_batches = len(world.batches)
    world.command(update(1))
    for _ in range(3):
        world.turn(make_request(len(world.requests) + 10, prompt(5), 3), num_results=1)
        assert len(world.batches) == num_batches
    world.turn(num_results=1)
    assert len(world.batches) > num_batches
    world.drain()


def test_the_prefix_cache_does_not_outlive_the_weights() -> None:
    world = World(make_config())
    world.finish(make_request(1, prompt(13), 3))
    command = world.command(update(1))
    land_all(world)
    assert (answer_of(world, command).num_pages, answer_of(world, command).num_tokens) == (3, 12)
    assert world.manager.gauges().num_free_pages == world.config.num_pages
    world.finish(make_request(2, prompt(13), 3))
    assert world.answers[2, 0].num_cached_tokens == 0
    world.finish(make_request(3, prompt(13), 3))
    assert world.answers[3, 0].num_cached_tokens == 12


def test_a_refused_update_changes_nothing() -> None:
    world = World(make_config())
    world.finish(make_request(1, prompt(13), 3))
    command = world.command(update(1, BAD_FILES))
    land_all(world)
    assert "checksum" in failure_of(world, command).reason
    assert world.manager.statistics().weights_version == 0
    world.finish(make_request(2, prompt(13), 3))
    assert world.answers[2, 0].num_cached_tokens == 12
    assert world.answers[2, 0].weights_versions == [0] * 3
    good = world.command(update(1))  # the version is not used up
    land_all(world)
    assert answer_of(world, good).weights_version == 1


def test_an_update_does_not_end_a_pause() -> None:
    world = busy_world()
    world.command(KEEP)
    command = world.command(update(1))
    land_all(world)
    answer_of(world, command)
    assert world.manager.at_rest
    assert world.manager.statistics().paused
    world.command(Resume())
    world.drain()


def test_versions_must_grow_and_fit_their_column() -> None:
    world = World(make_config())
    for version in (0, -1, MAX_WEIGHTS_VERSION + 1):
        failure = failure_of(world, world.command(update(version)))
        assert failure.field == "version", version
    assert not world.controls
    command = world.command(update(MAX_WEIGHTS_VERSION))
    land_all(world)
    answer_of(world, command)
    world.finish(make_request(1, prompt(5), 3))


# --- memory --------------------------------------------------------------------------------------


def test_nothing_runs_until_memory_is_restored() -> None:
    for parts in ((True, False), (False, True), (True, True)):
        world = busy_world()
        release = world.command(ReleaseMemory(*parts))
        land_all(world)
        answer_of(world, release)
        assert world.manager.statistics().paused, parts
        num_batches = len(world.batches)
        world.turn(make_request(9, prompt(5), 3))
        assert len(world.batches) == num_batches, parts
        world.command(RestoreMemory(*parts))
        assert not world.manager.at_rest
        world.drain()
        assert not world.manager.statistics().paused, parts


def test_a_released_kv_cache_leaves_nothing_to_find() -> None:
    world = World(make_config())
    world.finish(make_request(1, prompt(13), 3))
    release = world.command(ReleaseMemory(False, True))
    land_all(world)
    assert answer_of(world, release).num_pages == 3
    world.command(RESTORE_ALL)
    world.finish(make_request(2, prompt(13), 3))
    assert world.answers[2, 0].num_cached_tokens == 0


def test_released_weights_leave_the_kv_cache_alone() -> None:
    world = World(make_config())
    world.finish(make_request(1, prompt(13), 3))
    world.command(ReleaseMemory(True, False))
    world.turn(num_results=1)
    world.command(RestoreMemory(True, False))
    world.finish(make_request(2, prompt(13), 3))
    assert world.answers[2, 0].num_cached_tokens == 12


def test_only_what_is_left_is_released_and_only_what_is_missing_restored() -> None:
    world = World(make_config())
    actions = [
        RESTORE_ALL,
        ReleaseMemory(True, False),
        RELEASE_ALL,
        RELEASE_ALL,
        RestoreMemory(False, True),
        RESTORE_ALL,
    ]
    for action in actions:
        command = world.command(action)
        land_all(world)
        answer_of(world, command)
    parts = [
        (type(control.action), control.action.weights, control.action.kv_cache)
        for control in world.controls
    ]
    assert parts == [
        (ReleaseMemory, True, False),
        (ReleaseMemory, False, True),
        (RestoreMemory, False, True),
        (RestoreMemory, True, False),
    ]


def test_a_resume_fails_while_memory_is_released() -> None:
    world = busy_world()
    world.command(KEEP)
    world.command(RELEASE_ALL)
    resume = world.command(Resume())
    land_all(world)
    assert "restore it first" in failure_of(world, resume).reason
    world.command(RESTORE_ALL)
    world.command(Resume())
    land_all(world)
    world.drain()


def test_without_weights_nothing_runs_until_an_update() -> None:
    world = busy_world()
    world.device.keeps_files = False
    world.command(RELEASE_ALL)
    restore = world.command(RESTORE_ALL)
    resume = world.command(Resume())
    bad = world.command(update(1, BAD_FILES))
    still = world.command(Resume())
    land_all(world)
    assert answer_of(world, restore).lacks_weights
    assert "update them first" in failure_of(world, resume).reason
    failure_of(world, bad)
    failure_of(world, still)
    assert world.manager.at_rest
    world.command(update(1))
    world.drain()
    assert world.answers[3, 0].weights_versions == [1] * 20


def test_an_update_restores_released_weights() -> None:
    """So a trainer does not wait until the former weights are read again."""
    world = busy_world()
    world.command(RELEASE_ALL)
    bad = world.command(update(1, BAD_FILES))
    good = world.command(update(1))
    resume = world.command(Resume())
    land_all(world)
    failure_of(world, bad)
    answer_of(world, good)
    assert "restore it first" in failure_of(world, resume).reason  # the KV cache
    world.command(RestoreMemory(True, True))
    world.drain()
    assert world.answers[3, 0].weights_versions[-1] == 1


def test_weights_are_updated_while_the_kv_cache_is_released() -> None:
    """A trainer fills the weights first, and gives the cache its memory when it has space."""
    world = busy_world()
    world.command(RELEASE_ALL)
    world.command(RestoreMemory(True, False))
    command = world.command(update(1))
    land_all(world)
    answer_of(world, command)
    assert world.manager.at_rest
    world.command(RestoreMemory(False, True))
    world.drain()


def test_a_drain_fails_where_sequences_cannot_run_to_their_ends() -> None:
    world = busy_world()
    world.command(RELEASE_ALL)
    drain = world.command(DRAIN)
    land_all(world)
    assert "cannot run to their ends" in failure_of(world, drain).reason
    world.turn(AbortRequest(1), AbortRequest(2))
    answer_of(world, world.command(DRAIN))  # only one is left, which has not begun
    world.command(RESTORE_ALL)
    world.command(Resume())
    land_all(world)
    world.drain()


# --- order ---------------------------------------------------------------------------------------


def test_commands_of_one_turn_are_carried_out_in_order() -> None:
    world = busy_world()
    actions = [DRAIN, update(1), FlushCache(), RELEASE_ALL, RESTORE_ALL, update(2), Resume()]
    commands = [world.make_command(action) for action in actions]
    world.turn(*commands)
    assert not world.command_answers
    land_all(world)
    assert world.done == [command.command_id for command in commands]
    world.drain()
    assert world.answers[1, 0].weights_versions == [0] * 20
    assert world.answers[3, 0].weights_versions == [2] * 20


def test_a_flush_does_not_wait_for_a_drain() -> None:
    world = busy_world()
    drain, flush = world.command(DRAIN), world.command(FlushCache())
    assert world.done == [flush]
    world.command(Resume())
    assert drain in world.failed
    world.drain()


def test_the_answer_to_abort_all_comes_after_the_updates() -> None:
    world = busy_world()
    command = world.make_command(AbortAll())
    actions = world.manager.take_turn([command], 0.0)
    kinds = [type(message).__name__ for message in actions.messages]
    assert kinds == ["SequenceUpdates", "CommandDone"]


# --- the worker ----------------------------------------------------------------------------------


def test_a_worker_that_takes_too_long_is_an_error() -> None:
    for action, name in ((update(3), "UpdateWeights"), (RELEASE_ALL, "ReleaseMemory")):
        world = World(make_config())
        assert world.manager.deadline is None
        world.command(action)
        deadline = world.manager.deadline
        assert deadline == pytest.approx(world.now + TIME_LIMITS_S[type(action)])
        world.manager.take_turn([], deadline - 0.1)
        with pytest.raises(EngineError, match=f"{name} .control 0. within its limit of"):
            world.manager.take_turn([], deadline)


def test_an_answer_that_comes_just_after_the_deadline_counts() -> None:
    world = World(make_config())
    world.command(update(3))
    world.now = world.manager.deadline
    world.turn(num_results=1)
    assert world.manager.statistics().weights_version == 3


def test_answers_to_other_controls_are_an_error() -> None:
    world = World(make_config())
    with pytest.raises(ProtocolError, match="result of control 0 where none"):
        world.manager.take_turn([ControlDone(0)], 0.0)
    world.turn(make_request(1, prompt(5), 20))
    with pytest.raises(ProtocolError, match="control 0, which is a batch"):
        world.manager.take_turn([ControlDone(0)], 0.0)
    result = world.results[0]
    world = World(make_config())
    world.command(update(1))
    with pytest.raises(ProtocolError, match="batch 0, which is a control"):
        world.manager.take_turn([result], 0.0)


# --- figures -------------------------------------------------------------------------------------


def test_no_end_is_predicted_while_requests_wait_for_a_command() -> None:
    world = busy_world()
    assert world.manager.eta() is not None
    world.command(KEEP)
    assert world.manager.eta() is None
    world.command(Resume())
    land_all_but_some(world)
    assert world.manager.eta() is not None
    world.command(RELEASE_ALL)
    land_all(world)
    assert world.manager.eta() is None
    world.command(RESTORE_ALL)
    world.drain()


def land_all_but_some(world: World) -> None:
    for _ in range(6):
        world.turn(num_results=1)


def test_the_time_of_a_control_is_not_that_of_a_step() -> None:
    world = busy_world()
    world.command(update(1))
    for _ in range(3):
        world.turn(num_results=1)
    step_s = world.manager.statistics().step_s
    world.now += 1000.0
    for _ in range(4):
        world.turn(num_results=1)
    assert world.manager.statistics().step_s <= step_s
    world.drain()


def test_a_turn_with_a_command_does_not_change_the_look_ahead() -> None:
    world = busy_world(adapt_steps_ahead=True, scheduling_steps_ahead=3)
    world.manager.turn_took(0.0)
    world.turn(num_results=1)
    depth = world.manager._look_ahead.depth
    world.command(FlushCache())
    world.manager.turn_took(1000.0)
    assert world.manager._look_ahead.depth == depth
    world.turn(num_results=1)
    world.manager.turn_took(1000.0)
    assert world.manager._look_ahead.depth == 3
    world.drain()


def test_one_message_may_acknowledge_a_sequence_twice() -> None:
    """The server searches each row of a sequence that has one for each version."""
    world = World(make_config(stop_lag=2))
    world.turn(make_request(1, prompt(5), 12, hold_for_acks=True))
    for _ in range(3):
        world.turn(num_results=1)
    assert len(world.answers[1, 0].ids) == 2
    twice = Acknowledge(np.array([1, 1]), np.array([0, 0], np.int32), np.array([1, 2], np.int32))
    world.turn(twice)
    assert world.manager.num_in_flight == 2
    world.drain()
