"""What counts as a stall, on a clock of its own."""

from __future__ import annotations

from collections.abc import Iterable

from tokasaurus.config.engine import EngineConfig
from tokasaurus.launch.figures import WorkerWatch
from tokasaurus.launch.stalls import ManagerWatch, StallWatch
from tokasaurus.manager.manager import Manager
from tokasaurus.planner.configuration import simulated_slices

LIMIT_S = 10.0
INTERVAL_S = 1.0


def stalls(marks: Iterable[int | None], step_s: float = INTERVAL_S) -> list[float]:
    """For how long a watch has seen a stall, after each check."""
    watch, found = StallWatch(LIMIT_S, INTERVAL_S), []
    for number, mark in enumerate(marks):
        watch.check(mark, 100 + number * step_s)
        found.append(watch.stalled_s)
    return found


def test_a_stall_begins_at_the_limit_and_ends_with_progress():
    found = stalls([*[7] * 13, 8, 8])
    assert found[:10] == [0.0] * 10
    assert found[10:] == [10.0, 11.0, 12.0, 0.0, 0.0]


def test_slow_progress_and_no_work_are_not_stalls():
    assert not any(stalls(number // 9 for number in range(100)))
    assert not any(stalls([None] * 100))


def test_the_time_before_there_was_work_does_not_count():
    assert stalls([*[None] * 50, *[3] * 11])[-2:] == [0.0, 10.0]


def test_the_time_in_which_the_watching_process_stood_still_does_not_count():
    """Of each hour between two checks, two intervals count."""
    assert stalls([1] * 6, step_s=3600.0) == [0.0, 0.0, 0.0, 0.0, 0.0, 10.0]


class Asked:
    """A manager that is asked now and then."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.now = 0.0
        self.watch = ManagerWatch(LIMIT_S, INTERVAL_S, self._ask)

    def _ask(self) -> None:
        self.num_asked += 1

    def check(self, has_work: bool, times: int = 1) -> float:
        for _ in range(times):
            self.now += INTERVAL_S
            stalled_s = self.watch.check(has_work, self.now)
        return stalled_s


def test_a_manager_is_asked_once_in_half_of_the_limit_and_is_fine_if_it_answers():
    asked = Asked()
    for answers in range(5):
        assert asked.check(True, 6) == 0.0
        assert asked.num_asked == answers + 1
        asked.watch.num_heard += 1
    assert asked.check(False, 100) == 0.0
    assert asked.num_asked == 5


def test_a_silent_manager_stalls_until_it_says_something():
    asked = Asked()
    assert asked.check(True, 10) == 0.0
    assert asked.check(True) == 10.0
    assert asked.check(True, 50) == 60.0
    assert asked.num_asked == 1
    asked.watch.num_heard += 1
    assert asked.check(True) == 0.0


def test_a_silent_manager_stalls_though_its_clients_have_given_up():
    asked = Asked()
    asked.check(True, 7)
    assert asked.check(False, 5) == 11.0
    asked.watch.num_heard += 1
    assert asked.check(False) == 0.0
    assert asked.check(False, 100) == 0.0


def test_requests_that_end_before_the_manager_is_asked_leave_nothing_behind():
    asked = Asked()
    asked.check(True, 4)
    assert asked.check(False, 100) == 0.0
    assert asked.num_asked == 0


class FakeManager(Manager):
    """A manager with whatever the test puts in flight."""

    awaited_batch: int | None = None  # type: ignore[assignment]


def worker_watch() -> tuple[FakeManager, WorkerWatch]:
    (replica,) = simulated_slices(EngineConfig(kv_cache_num_tokens=8192)).replicas
    manager = FakeManager(replica.manager)
    return manager, WorkerWatch(manager, LIMIT_S)


def test_a_worker_that_answers_nothing_is_reported_until_it_answers():
    manager, watch = worker_watch()
    manager.awaited_batch = 4
    reports = [[each.seconds for each in watch.check(float(now))] for now in range(1, 14)]
    assert reports == [[]] * 10 + [[10.0], [11.0], [12.0]]
    manager.awaited_batch = None
    assert [each.seconds for each in watch.check(14.0)] == [0.0]
    assert watch.check(15.0) == []


def test_a_control_is_not_a_stall():
    """Then the manager awaits no batch. A control has a time limit of its own."""
    _, watch = worker_watch()
    assert [watch.check(float(now)) for now in range(100)] == [[]] * 100


def test_a_worker_with_long_batches_gets_more_time():
    manager, watch = worker_watch()
    manager.awaited_batch = 4
    watch.expect(0.0)
    watch.expect(50.0)
    watch.expect(5.0)
    assert [watch.check(float(now)) for now in range(1, 51)] == [[]] * 50
    assert [each.seconds for each in watch.check(51.0)] == [50.0]


def test_a_manager_wakes_up_only_where_a_batch_is_awaited():
    manager, watch = worker_watch()
    assert watch.wait_s(None) is None
    assert watch.wait_s(77.0) == 77.0
    manager.awaited_batch = 4
    assert watch.wait_s(None) == 1.0
    assert watch.wait_s(0.5) == 0.5
