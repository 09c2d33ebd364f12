"""The order in which the worker's process submits batches and collects results."""

from __future__ import annotations

from dataclasses import dataclass

from tokasaurus.launch.worker_loop import WorkerLoop
from tokasaurus.protocol.commands import Control, ReleaseMemory


@dataclass
class FakePending:
    number: int
    is_done: bool
    events: list[str]

    def collect(self):
        self.events.append(f"collect {self.number}")
        return self.number


def events_of(arrivals: list[list[int | Control]], *, done_at_once: bool) -> list[str]:
    """What happens when these batches arrive turn by turn. None arrives when it is not awaited."""
    events: list[str] = []
    coming = iter(arrivals)

    def receive(timeout_s):
        batches = next(coming)
        assert batches or timeout_s == 0, "it waits for a batch while none is in flight"
        events.append("wait" if timeout_s is None else "look")
        return batches

    def submit(message):
        is_control = isinstance(message, Control)
        number = message.number if is_control else message
        events.append(f"submit control {number}" if is_control else f"submit {number}")
        return FakePending(number, done_at_once, events)

    loop = WorkerLoop(submit, receive, lambda result: events.append(f"send {result}"))
    for _ in arrivals:
        loop.take_turn()
    return events


def test_a_single_batch_is_collected_as_soon_as_no_other_is_there():
    assert events_of([[0], [], [1], []], done_at_once=False) == [
        *("wait", "submit 0", "look", "collect 0", "send 0"),
        *("wait", "submit 1", "look", "collect 1", "send 1"),
    ]


def test_the_next_batch_is_submitted_before_the_former_one_is_collected():
    assert events_of([[0], [1], [2], []], done_at_once=False) == [
        *("wait", "submit 0"),
        *("look", "submit 1", "collect 0", "send 0"),
        *("look", "submit 2", "collect 1", "send 1"),
        *("look", "collect 2", "send 2"),
    ]


def test_at_most_two_batches_are_in_flight_when_several_arrive_together():
    assert events_of([[0, 1, 2, 3], []], done_at_once=False) == [
        *("wait", "submit 0", "submit 1", "collect 0", "send 0"),
        *("submit 2", "collect 1", "send 1", "submit 3", "collect 2", "send 2"),
        *("look", "collect 3", "send 3"),
    ]


def test_every_result_before_a_control_is_sent_before_it_is_carried_out():
    control = Control(2, ReleaseMemory(True, True))
    assert events_of([[0], [1, control], [3], []], done_at_once=False) == [
        *("wait", "submit 0"),
        *("look", "submit 1", "collect 0", "send 0", "collect 1", "send 1", "submit control 2"),
        *("look", "submit 3", "collect 2", "send 2"),
        *("look", "collect 3", "send 3"),
    ]


def test_a_batch_that_ran_as_it_was_submitted_is_sent_before_the_next_is_submitted():
    assert events_of([[0, 1], [2]], done_at_once=True) == [
        *("wait", "submit 0", "collect 0", "send 0", "submit 1", "collect 1", "send 1"),
        *("wait", "submit 2", "collect 2", "send 2"),
    ]
