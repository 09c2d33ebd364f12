"""Which replicas are started again, on a clock of its own."""

from __future__ import annotations

from tokasaurus.launch.restarts import WITHIN_S, Restarts


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_replica_starts_again_so_often_within_a_time() -> None:
    clock = Clock()
    restarts = Restarts(3, clock)
    for replica in (0, 1):
        for _ in range(3):
            restarts.ready(replica)
            assert restarts.ended(replica) is None
        restarts.ready(replica)
        assert restarts.ended(replica) == "it was started again 3 times in 10 minutes"
    clock.now += WITHIN_S + 1
    restarts.ready(0)
    assert restarts.ended(0) is None


def test_a_replica_that_is_never_ready_is_given_up_soon() -> None:
    reason = "2 starts in a row have not made it ready"
    restarts = Restarts(100)
    assert [restarts.ended(0) for _ in range(2)] == [None, reason]
    restarts.ready(1)
    # The first end is that of a replica that was ready.
    assert [restarts.ended(1) for _ in range(3)] == [None, None, reason]


def test_no_replica_starts_again_where_the_user_wants_none() -> None:
    restarts = Restarts(0)
    restarts.ready(0)
    assert restarts.ended(0) == "replica_restarts=0"
