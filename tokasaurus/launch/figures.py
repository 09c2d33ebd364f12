"""What a manager reports unasked: predictions and statistics, and a worker that stalls."""

from __future__ import annotations

import time

from tokasaurus.launch.stalls import StallWatch, check_interval_s
from tokasaurus.manager.manager import Manager
from tokasaurus.protocol.messages import Statistics, ToServer, WorkerStall
from tokasaurus.protocol.watching import Outlook

__all__ = ["Figures", "WorkerWatch"]

_STATISTICS_INTERVAL_S = 1.0
_ETA_INTERVAL_S = 1.0
_OUTLOOK_INTERVAL_S = 0.9  # not much more than one in a second, and not less
_ETA_REST = 50  # the interval is at least this many times the duration of the estimate


class Figures:
    """Says when a manager's figures are due. At rest they are due once more, and then never.

    Args:
        manager: of the figures.
    """

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._eta_due_at = 0.0
        self._outlook_due_at = 0.0
        self._statistics_due_at = 0.0
        self._at_rest = False  # and the server knows

    @property
    def wait_s(self) -> float | None:
        """How long to wait for an event; None waits without limit.

        If none comes, ``at_rest`` is due where the manager rests. Otherwise a turn without events
        is due, since a control has exceeded its time limit.
        """
        until = self._manager.deadline
        if self._manager.at_rest and not self._at_rest:
            until = self._statistics_due_at
        return None if until is None else max(0.0, until - time.monotonic())

    def at_rest(self) -> Statistics:
        """The last figures before a rest, when no event came within ``wait_s``."""
        self._at_rest = True
        return self._manager.statistics()

    def after_turn(self) -> list[ToServer]:
        """The figures that are due after a turn of the manager."""
        self._at_rest = False
        due: list[ToServer] = []
        now = time.monotonic()
        if now >= self._eta_due_at:
            eta = self._manager.eta()
            if eta is not None:
                due.append(eta)
            self._eta_due_at = now + max(_ETA_INTERVAL_S, _ETA_REST * (time.monotonic() - now))
        if now >= self._outlook_due_at:
            due += self._outlook()
        if now >= self._statistics_due_at:
            due.append(self._manager.statistics())
            self._statistics_due_at = now + _STATISTICS_INTERVAL_S
        return due

    def _outlook(self) -> list[Outlook]:
        """The forecast, if it is watched: it takes a small share of the time, too."""
        started = time.monotonic()
        found = self._manager.outlook()
        if found is None:
            return []
        took_s = time.monotonic() - started
        self._outlook_due_at = started + max(_OUTLOOK_INTERVAL_S, _ETA_REST * took_s)
        return [found]


class WorkerWatch:
    """Whether the worker answers the batches in flight. A control has a time limit of its own.

    It costs nothing per batch: the manager's loop asks it when it wakes up for lack of events, and
    otherwise once in an interval.

    Args:
        manager: knows what is in flight.
        limit_s: the time that the worker may take for a batch.
    """

    def __init__(self, manager: Manager, limit_s: float) -> None:
        self._manager = manager
        self._interval_s = check_interval_s(limit_s)
        self._watch = StallWatch(limit_s, self._interval_s)
        self._due_at = 0.0

    def expect(self, batch_s: float) -> None:
        """A batch may take this long: a longer time limit than before is needed, perhaps."""
        self._watch.limit_s = max(self._watch.limit_s, batch_s)

    def wait_s(self, wait_s: float | None) -> float | None:
        """How long to wait for an event, if there were no worker to watch; shorter if there is."""
        if self._manager.awaited_batch is None and not self._watch.stalled_s:
            return wait_s
        return self._interval_s if wait_s is None else min(wait_s, self._interval_s)

    def check(self, now: float) -> list[WorkerStall]:
        """What the server has to know, if anything."""
        if now < self._due_at:
            return []
        self._due_at = now + self._interval_s
        was_stalled = self._watch.stalled_s > 0
        self._watch.check(self._manager.awaited_batch, now)
        stalled_s = self._watch.stalled_s
        return [WorkerStall(stalled_s)] if stalled_s or was_stalled else []
