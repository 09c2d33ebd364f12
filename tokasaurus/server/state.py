"""Whether the engine behind the server can serve: the composition root says so, the endpoints ask.

::

    loading ──ready()──▶ ok ──drain()──▶ draining
       └──────────────────┴──────die()──────┴───▶ dead
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from tokasaurus.errors import EngineDead, EngineNotReady
from tokasaurus.protocol.messages import Statistics
from tokasaurus.server.metrics import Figure, Metrics, figures
from tokasaurus.text.generations import Etas, Generations
from tokasaurus.text.preparation import Preparer

__all__ = ["EngineState"]

_POLL_S = 0.02


class EngineState:
    """The state of one engine. All methods belong to the event loop's thread.

    Attributes:
        status: "loading", "ok", "draining" or "dead".
        metrics: for monitoring.
    """

    def __init__(self) -> None:
        self.status = "loading"
        self._preparer: Preparer | None = None
        self._generations: Generations | None = None
        self._reason = ""
        self.metrics = Metrics(self.figures)

    def ready(self, preparer: Preparer, generations: Generations) -> None:
        """The model is loaded: requests may come."""
        if self.status == "loading":
            self.status, self._preparer, self._generations = "ok", preparer, generations

    def drain(self) -> None:
        """New requests are refused from now on; those in flight go on."""
        if self.status != "dead":
            self.status = "draining"

    def die(self, reason: str) -> None:
        """Every request in flight, and every later one, ends with this reason."""
        if self.status == "dead":
            return
        self.status, self._reason = "dead", reason
        if self._generations is not None:
            self._generations.fail_all(EngineDead(reason))

    async def drained(self) -> None:
        """Returns when nothing is in flight any more."""
        while self.num_running:
            await asyncio.sleep(_POLL_S)

    @property
    def num_running(self) -> int:
        """Prompts in flight."""
        return 0 if self._generations is None else len(self._generations)

    @property
    def statistics(self) -> Statistics | None:
        """What the manager has counted; None until it has said."""
        return None if self._generations is None else self._generations.statistics

    def etas(self) -> Etas:
        """When what is in flight is predicted to end."""
        return Etas({}, 0.0) if self._generations is None else self._generations.etas()

    def figures(self) -> Iterator[Figure]:
        """What there is to tell monitoring; nothing before the engine has begun."""
        return figures(self._generations)

    def check(self) -> None:
        """Raises EngineNotReady or EngineDead if nothing can be served."""
        if self.status == "loading":
            raise EngineNotReady("the model is still loading; try again in a moment")
        if self.status == "draining":
            raise EngineNotReady("the engine is shutting down")
        if self.status == "dead":
            raise EngineDead(f"the engine is dead: {self._reason}")

    def preparer(self) -> Preparer:
        """Who prepares a request, right now. Raises what ``check`` raises."""
        self.check()
        assert self._preparer is not None
        return self._preparer

    def generations(self) -> Generations:
        """Where to start a request, right now. Raises what ``check`` raises."""
        self.check()
        assert self._generations is not None
        return self._generations
