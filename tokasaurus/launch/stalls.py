"""Whether a process that has work makes progress."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["ManagerWatch", "StallWatch", "check_interval_s"]

_LONGEST_INTERVAL_S = 1.0
_CHECKS = 8  # at least, until a stall is noticed


def check_interval_s(limit_s: float) -> float:
    """How often to check, in seconds."""
    return min(_LONGEST_INTERVAL_S, limit_s / _CHECKS)


class StallWatch:
    """Adds up the time without progress, from check to check.

    Between two checks at most two intervals count. So the time in which the watching process itself
    stood still is not held against the other one.

    Args:
        limit_s: the time from which on it is a stall; it may be raised later.
        interval_s: about how often ``check`` is called.
    """

    def __init__(self, limit_s: float, interval_s: float) -> None:
        self.limit_s = limit_s
        self.waited_s = 0.0  # since the last progress
        self._longest_step_s = 2 * interval_s
        self._mark: int | None = None
        self._checked_at = 0.0

    @property
    def stalled_s(self) -> float:
        """How long there has been no progress; 0 if that is no longer than usual."""
        return self.waited_s if self.waited_s >= self.limit_s else 0.0

    def check(self, mark: int | None, now: float) -> None:
        """Notes the state.

        Args:
            mark: a number that changes with any progress; None if there is no work.
            now: seconds on any clock.
        """
        if mark is None or mark != self._mark:
            self.waited_s = 0.0
        else:
            self.waited_s += min(now - self._checked_at, self._longest_step_s)
        self._mark, self._checked_at = mark, now


class ManagerWatch:
    """Whether a manager answers, as the server sees it.

    A manager may have nothing to say for hours, though it has requests: while a batch runs, or in a
    pause. So it is asked when it has been silent for half of the time limit.

    Args:
        limit_s: how long a manager may be silent.
        interval_s: about how often ``check`` is called.
        ask: makes the manager say something.

    Attributes:
        num_heard: messages of the manager so far; the receiver counts them.
    """

    def __init__(self, limit_s: float, interval_s: float, ask: Callable[[], None]) -> None:
        self.num_heard = 0
        self._ask = ask
        self._asked_after: int | None = None  # what num_heard was
        self._watch = StallWatch(limit_s, interval_s)

    def check(self, has_work: bool, now: float) -> float:
        """How long the manager has been silent; 0 if that is no longer than usual.

        Args:
            has_work: it has something that it must answer sooner or later.
            now: seconds on any clock.
        """
        # Where the clients give up meanwhile, there is still a question to be answered.
        is_awaited = has_work or self._asked_after == self.num_heard
        self._watch.check(self.num_heard if is_awaited else None, now)
        if self._watch.waited_s >= self._watch.limit_s / 2 and self._asked_after != self.num_heard:
            self._asked_after = self.num_heard
            self._ask()
        return self._watch.stalled_s
