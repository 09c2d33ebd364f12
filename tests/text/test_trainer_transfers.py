"""Transfers of weights from a trainer, as the text core and its router see them."""

from __future__ import annotations

from test_receipts import Core
from test_replica_router import Engine, join, text_core

from tokasaurus.errors import Conflict, RequestError
from tokasaurus.protocol.commands import (
    Command,
    CommandDone,
    CommandFailed,
    JoinWeightsGroup,
    LeaveWeightsGroup,
    ReceiveWeights,
    UpdateWeights,
)

JOIN = JoinWeightsGroup("g", "host", 1, 1, 4, "gloo", 1.0)
RECEIVE = ReceiveWeights("g", ("a",), ("float32",), ((2,),), False, False, 1.0)


def test_all_tensors_have_come_when_each_replica_has_them() -> None:
    for lacking in (None, 0, 1):
        engine = Engine()
        engine.router.send(Command(1, RECEIVE))
        assert engine.router.absorb(0, CommandDone(1, has_all_tensors=lacking != 0)) == []
        (done,) = engine.router.absorb(1, CommandDone(1, has_all_tensors=lacking != 1))
        assert done.has_all_tensors == (lacking is None)


def test_where_one_replica_cannot_go_on_the_others_leave_the_group() -> None:
    for action in (JOIN, RECEIVE):
        engine = Engine(3)
        engine.router.send(Command(1, action))
        engine.router.absorb(2, CommandDone(1))
        assert engine.router.absorb(0, CommandFailed(1, "no", "names")) == []
        (leave,) = [each for each in engine.sent[1] if isinstance(each.action, LeaveWeightsGroup)]
        assert leave.action.group == "g"
        assert [type(each.action) for each in engine.sent[2]] == [type(action)]
        (answer,) = engine.router.absorb(1, CommandFailed(1, "it was left meanwhile"))
        assert isinstance(answer, CommandFailed)
        assert engine.router.absorb(1, CommandDone(leave.command_id)) == []


def test_a_replica_that_waits_for_a_trainer_does_not_stall() -> None:
    engine = Engine()
    engine.router.send(Command(1, JOIN))
    assert not engine.router.is_awaited(0)
    engine.router.send(Command(2, UpdateWeights(1, ("f",))))
    assert engine.router.is_awaited(0)


def test_a_replica_that_starts_again_waits_for_weights_that_came_from_a_trainer() -> None:
    engine, generations = text_core()
    answers: list[object] = []
    generations.update_weights((), answers.append, are_received=True)
    for replica in (0, 1):
        for message in engine.router.absorb(replica, CommandDone(0, weights_version=1)):
            generations.absorb(message)
    generations.command(RECEIVE, answers.append)  # the others are on their way
    engine.router.lost(0, "killed", starts_again=True)
    told = join(engine, generations, 0)
    assert told == []
    report = engine.router.reports()[0]
    assert report.state == "waiting for weights"
    assert "came from a trainer" in (engine.router.obstacle(0) or "")


def test_a_transfer_holds_up_no_shutdown_and_is_no_work() -> None:
    _, generations = text_core()
    commands = generations.commands
    generations.command(RECEIVE, lambda result: None)
    assert commands.num_unanswered == 0
    assert not generations.await_manager
    commands.is_paused = True
    assert commands.hold_everything


def test_a_refusal_names_the_field_and_lacking_tensors_are_a_conflict() -> None:
    _, generations = text_core()
    answers: list[object] = []
    generations.command(RECEIVE, answers.append)
    generations.commands.absorb(CommandFailed(0, "no such tensor", "names"))
    generations.update_weights((), answers.append, are_received=True)
    generations.commands.absorb(CommandFailed(1, "these tensors have not come: a"))
    first, second = answers
    assert isinstance(first, RequestError)
    assert first.field == "names"
    assert isinstance(second, Conflict)


def test_an_answer_of_weights_without_files_has_no_receipt() -> None:
    core = Core()
    core.receipts.note_update(1, ())
    core.fake.weights_version = 1
    assert "came from a trainer" in core.receipt()["void"]
