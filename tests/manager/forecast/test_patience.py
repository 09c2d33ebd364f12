"""When the head of the queue is asked about again."""

from __future__ import annotations

from simulation import make_request, prompt

from tokasaurus.manager.forecast.patience import Patience
from tokasaurus.manager.sequence import Sequence
from tokasaurus.manager.shares import Shares
from tokasaurus.manager.waiting import Backlog

PAGE_SIZE = 16


def sequence(request_id: int) -> Sequence:
    backlog = Backlog(4, Shares(lambda priority: None, float))
    return backlog.add(make_request(request_id, prompt(5), 4), 0.0).sequences[0]


def wait(patience: Patience, head: Sequence, step: int) -> int:
    """Steps after this one until the head is asked about again."""
    return next(count for count in range(1000) if patience.is_over(head, step + count))


def test_each_refusal_doubles_the_wait_up_to_64_steps() -> None:
    head, patience, step, waits = sequence(1), Patience(PAGE_SIZE), 100, []
    assert patience.is_over(head, step)
    for _ in range(4):
        patience.refuse(head, step)
        waits.append(wait(patience, head, step))
        step += waits[-1]
    assert waits == [16, 32, 64, 64]


def test_another_head_and_none_are_asked_about_at_once() -> None:
    patience = Patience(PAGE_SIZE)
    assert patience.is_over(None, 0)
    patience.refuse(sequence(1), 0)
    assert patience.is_over(sequence(2), 0)
    assert patience.is_over(None, 0)


def test_pages_that_come_free_end_the_wait_and_shorten_the_next() -> None:
    head, patience = sequence(1), Patience(PAGE_SIZE)
    for _ in range(3):
        patience.refuse(head, 0)
    patience.pages_come_free()
    assert patience.is_over(head, 0)
    patience.refuse(head, 0)
    assert wait(patience, head, 0) == PAGE_SIZE


def test_asking_again_forgets_the_refusal_and_keeps_the_longer_wait() -> None:
    head, patience = sequence(1), Patience(PAGE_SIZE)
    patience.refuse(head, 0)
    patience.forget()
    assert patience.is_over(head, 1)
    patience.refuse(head, 1)
    assert wait(patience, head, 1) == 2 * PAGE_SIZE
