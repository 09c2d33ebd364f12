"""Transfers of weights beside batches: what ends them, and that nothing waits for them."""

from __future__ import annotations

from fake_device import BAD_NAMES
from simulation import World, make_config, make_request, prompt

from tokasaurus.manager.controls import TIME_LIMITS_S
from tokasaurus.protocol.commands import (
    CommandDone,
    CommandFailed,
    FlushCache,
    GroupAction,
    JoinWeightsGroup,
    LeaveWeightsGroup,
    Pause,
    PauseMode,
    ReceiveWeights,
    Resume,
    TransferDone,
    UpdateWeights,
)

JOIN = JoinWeightsGroup("g", "host", 1, 1, 4, "gloo", 1.0)


def receive(*names: str) -> ReceiveWeights:
    count = len(names)
    return ReceiveWeights("g", names, ("float32",) * count, ((2,),) * count, False, False, 1.0)


def busy_world() -> World:
    world = World(make_config())
    world.turn(make_request(1, prompt(9), 40))
    for _ in range(3):
        world.turn(num_results=1)
    return world


def sent(world: World) -> list[type[GroupAction]]:
    return [type(each.action) for each in world.controls]


def begun(world: World, action: GroupAction) -> tuple[int, int]:
    """A command that the worker has begun: its id, and the number of its control."""
    command = world.command(action)
    number = world.controls[-1].number
    while any(each.number <= number for each in world.results):
        world.turn(num_results=1)
    return command, number


def report(world: World, number: int, rank: int, error: str | None = None, whole: bool = True):
    world.reports = []
    world.turn(reports=[TransferDone(number, rank, 3, error, whole)])


def test_batches_and_commands_go_on_while_a_transfer_waits_for_its_ranks() -> None:
    world = busy_world()
    command, number = begun(world, JOIN)
    num_tokens = world.manager.counters.num_generated_tokens
    for _ in range(5):
        world.turn(num_results=1)
    assert world.manager.counters.num_generated_tokens == num_tokens + 5
    flush = world.command(FlushCache())
    assert flush in world.command_answers
    for rank in range(3):
        assert command not in world.command_answers
        report(world, number, rank)
    assert isinstance(world.command_answers[command], CommandDone)
    world.drain()


def test_a_report_may_come_before_the_answer_to_the_control() -> None:
    world = busy_world()
    command = world.command(receive("a"))
    number = world.controls[-1].number
    for rank in range(3):
        report(world, number, rank)
    assert command not in world.command_answers
    while number not in [each.number for each in world.results][:1]:
        world.turn(num_results=1)
    world.turn(num_results=1)
    assert world.command_answers[command].has_all_tensors
    world.drain()


def test_all_tensors_are_there_when_every_rank_has_all() -> None:
    for lacking in (None, 0, 2):
        world = busy_world()
        command, number = begun(world, receive("a"))
        for rank in range(3):
            report(world, number, rank, whole=rank != lacking)
        assert world.command_answers[command].has_all_tensors == (lacking is None)
        world.drain()


def test_the_first_rank_that_fails_ends_the_transfer_and_all_ranks_leave() -> None:
    world = busy_world()
    command, number = begun(world, receive("a"))
    report(world, number, 0)
    report(world, number, 2, "rank 2 says no")
    answer = world.command_answers[command]
    assert isinstance(answer, CommandFailed)
    assert (answer.reason, answer.field) == ("rank 2 says no", None)
    assert sent(world) == [ReceiveWeights, LeaveWeightsGroup]
    report(world, number, 1)  # too late
    world.drain()


def test_a_refusal_of_the_worker_names_the_field() -> None:
    world = busy_world()
    command, _ = begun(world, receive(*BAD_NAMES))
    answer = world.command_answers[command]
    assert isinstance(answer, CommandFailed)
    assert answer.field == "names"
    world.drain()


def test_what_a_group_does_fails_when_it_is_left_or_joined_again() -> None:
    for action in (LeaveWeightsGroup("g"), JOIN):
        world = busy_world()
        command, number = begun(world, receive("a"))
        world.command(LeaveWeightsGroup("other"))
        assert command not in world.command_answers
        again = world.command(action)
        answer = world.command_answers[command]
        assert isinstance(answer, CommandFailed)
        assert "was left meanwhile" in answer.reason
        report(world, number, 0, "too late")
        numbers = [each.number for each in world.controls]
        for rank in range(3):
            if isinstance(action, JoinWeightsGroup):
                report(world, numbers[-1], rank)
        world.drain()
        assert isinstance(world.command_answers[again], CommandDone)


def test_a_transfer_waits_for_an_update_and_not_for_a_drain() -> None:
    world = busy_world()
    drain = world.command(Pause(PauseMode.DRAIN))
    command, number = begun(world, receive("a"))
    for rank in range(3):
        report(world, number, rank)
    assert command in world.command_answers
    assert drain not in world.command_answers
    world.command(Resume())
    world.command(UpdateWeights(1, (), (), True))
    begun(world, receive("b"))
    kinds = sent(world)
    assert kinds == [ReceiveWeights, UpdateWeights, ReceiveWeights]
    for rank in range(3):
        report(world, world.controls[-1].number, rank)
    world.drain()


def test_an_answer_to_the_control_has_a_limit_and_the_transfer_has_none() -> None:
    world = busy_world()
    command = world.command(JOIN)
    assert world.manager.deadline == world.now + TIME_LIMITS_S[JoinWeightsGroup]
    while world.manager.deadline is not None:
        world.turn(num_results=1)
    assert command not in world.command_answers
    for rank in range(3):
        report(world, world.controls[-1].number, rank)
    world.drain()
