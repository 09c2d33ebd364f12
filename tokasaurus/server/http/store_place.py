"""Which engine answers for files and batches, while a new engine takes over from an old one.

One engine at a time has the store. A request that reaches the other one is passed on, through a
Unix socket. While the store is on its way, requests wait::

    old engine    HERE ──leave()──▶ LEAVING ──left()──▶ THERE, with the new one
    new engine    THERE, with the old one ──arrived()──▶ HERE

Only requests of clients are passed on in both directions. One that the old engine has passed on
waits in the new one until the store has arrived, so none goes in circles.
"""

from __future__ import annotations

import asyncio
from enum import Enum, auto
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from tokasaurus.errors import EngineNotReady
from tokasaurus.server.http.answers import error_answer
from tokasaurus.server.http.passing_on import PassOn

__all__ = ["AtStore", "StorePlace"]

_PREFIXES = ("/v1/files", "/v1/batches")
_WAIT_S = 60.0  # for the store; its way takes milliseconds
_RETRY_S = 0.05
_QUIET_S = 60.0


class _Place(Enum):
    HERE = auto()
    LEAVING = auto()
    THERE = auto()


class StorePlace:
    """Where the store is, as one engine knows it.

    Args:
        elsewhere: the Unix socket of the engine that has it; None if it is here.
    """

    def __init__(self, elsewhere: str | None = None) -> None:
        self._place = _Place.HERE if elsewhere is None else _Place.THERE
        self._elsewhere = elsewhere
        self._gets_it = elsewhere is not None  # it will arrive here
        self._num_inside = 0
        self._changed = asyncio.Event()

    async def leave(self) -> None:
        """Returns when no request uses the store any more. Those that come meanwhile wait.

        An upload may take a while. So it is awaited before others have to wait, but not for ever,
        since there may always be another one.
        """
        deadline = asyncio.get_running_loop().time() + _QUIET_S
        while self._num_inside and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_RETRY_S)
        self._move(_Place.LEAVING)
        while self._num_inside:
            await asyncio.sleep(_RETRY_S)

    def left(self, elsewhere: str) -> None:
        """The store is given up; the engine behind this socket takes it."""
        self._elsewhere, self._gets_it = elsewhere, False
        self._move(_Place.THERE)

    def arrived(self) -> None:
        """The store is here from now on."""
        self._elsewhere, self._gets_it = None, False
        self._move(_Place.HERE)

    def _move(self, place: _Place) -> None:
        self._place = place
        self._changed.set()
        self._changed = asyncio.Event()

    async def answer(
        self, app: ASGIApp, scope: Scope, receive: Receive, send: Send, *, is_passed_on: bool
    ) -> None:
        """Answers a request where the store is.

        Args:
            app: answers it if the store is here.
            scope: of the request, as the next two.
            receive: its body.
            send: takes the answer.
            is_passed_on: the other engine has sent it.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _WAIT_S
        while loop.time() < deadline or self._place is _Place.LEAVING:
            if self._place is _Place.HERE:
                self._num_inside += 1
                try:
                    await app(scope, receive, send)
                finally:
                    self._num_inside -= 1
                return
            may_pass_on = self._place is _Place.THERE and not (is_passed_on and self._gets_it)
            if may_pass_on and await self._pass_on(scope, receive, send):
                return
            # The other engine has not opened its socket yet, or has ended.
            await self._wait_for_change()
        error = EngineNotReady("files and batches are on the way to a new engine; try again")
        await error_answer(error)(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> bool:
        elsewhere = self._elsewhere
        return elsewhere is not None and await PassOn(Path(elsewhere)).pass_on(scope, receive, send)

    async def _wait_for_change(self) -> None:
        changed = asyncio.create_task(self._changed.wait())
        await asyncio.wait({changed}, timeout=_RETRY_S)
        changed.cancel()


class AtStore:
    """The ASGI layer.

    Args:
        app: the layer inside.
        place: of the store.
        is_passed_on: requests come from the other engine.
    """

    def __init__(self, app: ASGIApp, place: StorePlace, *, is_passed_on: bool = False) -> None:
        self._app = app
        self._place = place
        self._is_passed_on = is_passed_on

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(_PREFIXES):
            await self._app(scope, receive, send)
            return
        await self._place.answer(self._app, scope, receive, send, is_passed_on=self._is_passed_on)
