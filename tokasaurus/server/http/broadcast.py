"""One stream of events for any number of viewers.

An event is made once in an interval, and only while there are viewers. All of them get the same
bytes, so a further viewer costs a write to its connection. A viewer that reads slowly misses
events: it is given the latest one, and nothing is queued for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from tokasaurus.errors import EngineOverloaded, TokasaurusError

__all__ = ["Broadcast", "Viewer"]

log = logging.getLogger(__name__)

_RETRY_AFTER_S = 10


class Viewer:
    """One reader of a broadcast: the ``Work`` of an ``EventStream``.

    Args:
        first: what it reads first.
        leave: called when it does not read any more.
    """

    def __init__(self, first: bytes, leave: Callable[[Viewer], None]) -> None:
        self._first: bytes | None = first
        self._latest: bytes | None = None
        self._leave = leave
        self._error: TokasaurusError | None = None
        self._is_over = False
        self._news = asyncio.Event()
        self._news.set()

    def __enter__(self) -> Viewer:
        return self

    def __exit__(self, *raised: object) -> None:
        self._leave(self)

    def interrupt(self, error: TokasaurusError) -> None:
        """Makes the events end with this error."""
        self._error = error
        self._news.set()

    def give(self, event: bytes) -> None:
        """Gives it an event, in the place of one that it has not read; the first is never lost."""
        self._latest = event
        self._news.set()

    def end(self) -> None:
        """Ends the stream after what was given last."""
        self._is_over = True
        self._news.set()

    async def events(self) -> AsyncIterator[bytes]:
        """The events, until the end."""
        while True:
            await self._news.wait()
            self._news.clear()
            if self._error is not None:
                raise self._error
            first, self._first = self._first, None
            if first is not None:
                yield first
            latest, self._latest = self._latest, None
            if latest is not None:
                yield latest
            if self._is_over:
                return


class Broadcast:
    """Makes events while there are viewers.

    Args:
        make_first: makes what a new viewer reads first.
        make_next: makes a further event; None ends the stream.
        interval_s: between two events.
        max_viewers: that may watch at a time.

    Attributes:
        num_made: events that were made, first ones and further ones.
    """

    def __init__(
        self,
        make_first: Callable[[], Awaitable[bytes]],
        make_next: Callable[[], Awaitable[bytes | None]],
        interval_s: float,
        max_viewers: int,
    ) -> None:
        self.num_made = 0
        self._make_first = make_first
        self._make_next = make_next
        self._interval_s = interval_s
        self._max_viewers = max_viewers
        self._viewers: set[Viewer] = set()
        self._num_joining = 0
        self._first: asyncio.Future[bytes] | None = None  # for all that come in an interval
        self._task: asyncio.Task[None] | None = None

    @property
    def num_viewers(self) -> int:
        return len(self._viewers)

    async def join(self) -> Viewer:
        """A new viewer.

        Raises:
            EngineOverloaded: there are too many.
        """
        if len(self._viewers) + self._num_joining >= self._max_viewers:
            raise EngineOverloaded(
                f"{self._max_viewers} viewers watch the engine already", _RETRY_AFTER_S
            )
        if self._first is None:
            self.num_made += 1
            self._first = asyncio.ensure_future(self._make_first())
            # Also where it fails, or where the viewer is gone before it is made.
            asyncio.get_running_loop().call_later(self._interval_s, self._forget_first)
        self._num_joining += 1
        try:
            viewer = Viewer(await asyncio.shield(self._first), self._viewers.discard)
        finally:
            self._num_joining -= 1
        self._viewers.add(viewer)
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return viewer

    def _forget_first(self) -> None:
        self._first = None

    async def _run(self) -> None:
        try:
            while self._viewers:
                await asyncio.sleep(self._interval_s)
                self.num_made += 1
                event = await self._make_next()
                if event is None:
                    break
                for viewer in self._viewers:
                    viewer.give(event)
        except Exception:
            log.exception("the stream of the page failed")
        finally:
            self._task = None
            for viewer in self._viewers:
                viewer.end()
