"""What lets requests in, and knows those that are under way."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["Flight", "Gate"]


@dataclass(eq=False)
class Flight:
    """A request under way.

    Attributes:
        request_id: that the engine knows it by.
        is_aborted: set when it shall not be sent again.
        is_over: set when it has its answer, or has failed.
        is_dropped: set when not even its present attempt shall be waited for.
    """

    request_id: str
    is_aborted: asyncio.Event = field(default_factory=asyncio.Event)
    is_over: asyncio.Event = field(default_factory=asyncio.Event)
    is_dropped: asyncio.Event = field(default_factory=asyncio.Event)


class Gate:
    """Open or closed. While it is closed, requests wait in front of it, or are turned away.

    For one event loop.
    """

    def __init__(self) -> None:
        self._opened = asyncio.Event()
        self._opened.set()
        self._turns_away = False
        self.flights: set[Flight] = set()

    @property
    def is_open(self) -> bool:
        return self._opened.is_set()

    def close(self, *, turn_away: bool) -> None:
        """Lets no further request in.

        Args:
            turn_away: requests that come do not wait for the gate to open, but are told that they
                are aborted. Those that wait already are told so, too.
        """
        self._opened.clear()
        self._turns_away = turn_away
        if turn_away:
            self._wake()

    def open(self) -> None:
        """Lets the requests in that wait, and those that come."""
        self._turns_away = False
        self._opened.set()

    async def admits(self) -> bool:
        """Waits until the gate is open. False if the request is turned away.

        A request that got True must enter a ``flight`` before its next await: then none is let in
        unseen while the gate closes.
        """
        while not self._opened.is_set():
            if self._turns_away:
                return False
            waiting = self._opened
            await waiting.wait()
        return True

    @contextmanager
    def flight(self, request_id: str) -> Iterator[Flight]:
        """The request is under way inside."""
        flight = Flight(request_id)
        self.flights.add(flight)
        try:
            yield flight
        finally:
            self.flights.discard(flight)
            flight.is_over.set()

    def _wake(self) -> None:
        """Lets the requests that wait look at the gate again, which stays closed."""
        waiting, self._opened = self._opened, asyncio.Event()
        waiting.set()
