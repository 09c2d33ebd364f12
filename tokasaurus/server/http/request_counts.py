"""Counts answers by route and status."""

from __future__ import annotations

from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokasaurus.server.http.passing_on import PASSED_ON

__all__ = ["CountRequests", "NewCounts"]

_OTHER_PATHS = "other"


class CountRequests:
    """A plain ASGI layer.

    Args:
        app: the layer inside.
        counter: with the labels path and status.
    """

    def __init__(self, app: ASGIApp, counter: Counter) -> None:
        self._app = app
        self._counter = counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500  # if nothing is answered here, the layer outside answers this

        def noting(message: Message) -> object:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            return send(message)

        try:
            await self._app(scope, receive, noting)  # type: ignore[arg-type]
        finally:
            if not scope.get(PASSED_ON):  # otherwise it is counted where it is answered
                # The route, not the path: clients can invent any number of paths.
                path = getattr(scope.get("route"), "path", _OTHER_PATHS)
                self._counter.labels(path, str(status)).inc()


class NewCounts:
    """What was counted since the last call.

    Args:
        counter: as above.
    """

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._told: dict[tuple[str, str], int] = {}

    def take(self) -> tuple[tuple[str, str, int], ...]:
        """Path, status and number of the answers since the last call."""
        new = []
        for metric in self._counter.collect():
            for sample in metric.samples:
                if sample.name.endswith("_total"):
                    key = sample.labels["path"], sample.labels["status"]
                    number = int(sample.value) - self._told.get(key, 0)
                    if number:
                        new.append((*key, number))
                        self._told[key] = int(sample.value)
        return tuple(new)
