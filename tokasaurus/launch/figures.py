"""What a manager reports unasked: its predictions and statistics, about once a second."""

from __future__ import annotations

import time

from tokasaurus.manager.manager import Manager
from tokasaurus.protocol.messages import Statistics, ToServer

__all__ = ["Figures"]

_STATISTICS_INTERVAL_S = 1.0
_ETA_INTERVAL_S = 1.0
_ETA_REST = 50  # the interval is at least this many times the duration of the estimate


class Figures:
    """Says when a manager's figures are due. At rest they are due once more, and then never.

    Args:
        manager: of the figures.
    """

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._eta_due_at = 0.0
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
        if now >= self._statistics_due_at:
            due.append(self._manager.statistics())
            self._statistics_due_at = now + _STATISTICS_INTERVAL_S
        return due
