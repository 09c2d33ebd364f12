"""Whether the engine behind the server can serve. The composition root says so; the routes ask.

::

    loading ──ready()──▶ ok ──drain()──▶ draining
       └──────────────────┴──────die()──────┴───▶ dead

"ok" is called "stalled" as long as a process that every request needs makes no progress, and
"restarting" while all replicas have ended and some are started again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokasaurus.cartridges.store import CartridgeStore
from tokasaurus.errors import EngineDead, EngineNotReady
from tokasaurus.observability.tracing import Tracing
from tokasaurus.protocol.messages import Statistics
from tokasaurus.server.history import History
from tokasaurus.server.metrics import Figure, Metrics, figures, limit_figures, store_figures
from tokasaurus.text.cartridges import PrefixSource
from tokasaurus.text.generations import Etas, Generations
from tokasaurus.text.preparation import Preparer

__all__ = ["Engine", "EngineState"]

_POLL_S = 0.02


@dataclass(frozen=True)
class Engine:
    """An engine whose model is loaded, as requests see it.

    Attributes:
        prefixes: for requests with cartridges; None if the engine has none.
        store: of cartridges; None if it is elsewhere.
    """

    preparer: Preparer
    generations: Generations
    prefixes: PrefixSource | None = None
    store: CartridgeStore | None = None


class EngineState:
    """The state of one engine. All methods belong to the event loop's thread.

    Attributes:
        metrics: for monitoring.
        history: of the last minutes; its owner takes the samples.
        is_retiring: another engine serves, and this one only finishes what it has.
        tracing: as given.

    Args:
        tracing: makes traces of requests; None if there are none.
    """

    def __init__(self, tracing: Tracing | None = None) -> None:
        self.tracing = tracing
        self._status = "loading"
        self._engine: Engine | None = None
        self._reason = ""
        self.is_retiring = False
        self._waiting: set[asyncio.Future[Any]] = set()
        self.metrics = Metrics(self.figures)
        self.history = History()

    def ready(
        self,
        preparer: Preparer,
        generations: Generations,
        prefixes: PrefixSource | None = None,
        store: CartridgeStore | None = None,
    ) -> None:
        """The model is loaded, and requests may come."""
        if self._status == "loading":
            self._status, self._engine = "ok", Engine(preparer, generations, prefixes, store)

    def drain(self) -> None:
        """New requests are refused from now on; those in flight go on."""
        if self._status != "dead":
            self._status = "draining"
            self._end_waiting()

    def die(self, reason: str) -> None:
        """Every request in flight, and every later one, ends with this reason."""
        if self._status == "dead":
            return
        self._status, self._reason = "dead", reason
        if self._engine is not None:
            self._engine.generations.fail_all(EngineDead(reason))
        self._end_waiting()

    @contextlib.contextmanager
    def waiting(self, task: asyncio.Future[Any]) -> Iterator[None]:
        """Surrounds the wait for what a request needs before it starts.

        The task is cancelled when the engine drains or dies; then this raises what ``check``
        raises.
        """
        self._waiting.add(task)
        try:
            yield
        except asyncio.CancelledError:
            self.check()
            raise
        finally:
            self._waiting.discard(task)

    def _end_waiting(self) -> None:
        for task in [*self._waiting]:
            task.cancel()

    async def drained(self) -> None:
        """Returns when nothing is in flight any more, or nothing of it can go on."""
        while self.num_running and not self.holds_everything:
            await asyncio.sleep(_POLL_S)

    @property
    def status(self) -> str:
        """ "loading", "ok", "stalled", "restarting", "draining" or "dead"."""
        if self._status != "ok" or self._engine is None:
            return self._status
        generations = self._engine.generations
        if generations.replicas is not None and not generations.replicas.num_seats:
            return "restarting"
        return "stalled" if generations.is_stuck else "ok"

    @property
    def replicas(self) -> dict[str, str]:
        """How each replica is, by number; empty if there is only one."""
        replicas = None if self._engine is None else self._engine.generations.replicas
        reports = {} if replicas is None else replicas.reports()
        return {str(number): report.state for number, report in reports.items()}

    @property
    def stalled(self) -> tuple[str, ...]:
        """The processes that have work and make no progress."""
        return () if self._engine is None else self._engine.generations.stalled

    @property
    def num_commands(self) -> int:
        """Commands that are being carried out."""
        return 0 if self._engine is None else self._engine.generations.commands.num_unanswered

    @property
    def holds_everything(self) -> bool:
        """Whether a pause, released memory or missing weights keep all requests waiting."""
        return self._engine is not None and self._engine.generations.commands.hold_everything

    @property
    def generations(self) -> Generations | None:
        """The table of prompts; None before the engine is ready."""
        return None if self._engine is None else self._engine.generations

    @property
    def num_running(self) -> int:
        """The number of prompts in flight."""
        return 0 if self._engine is None else len(self._engine.generations)

    @property
    def statistics(self) -> Statistics | None:
        """The manager's latest statistics; None before the first ones."""
        return None if self._engine is None else self._engine.generations.statistics

    def etas(self) -> Etas:
        """When everything in flight is predicted to end."""
        return Etas({}, 0.0) if self._engine is None else self._engine.generations.etas()

    def figures(self) -> Iterator[Figure]:
        """The figures for monitoring; none before the engine is ready."""
        if self._engine is not None:
            yield from figures(self._engine.generations)
            yield from limit_figures(self.history.limit)
            yield from store_figures(self._engine.store)

    def check(self) -> None:
        """Raises EngineNotReady or EngineDead if the engine cannot serve."""
        if self._status == "loading":
            raise EngineNotReady("the model is still loading; try again in a moment")
        if self._status == "draining":
            raise EngineNotReady("the engine is shutting down")
        if self._status == "dead":
            raise EngineDead(f"the engine is dead: {self._reason}")

    def engine(self) -> Engine:
        """The engine, which can serve at this moment. Raises what ``check`` raises."""
        self.check()
        assert self._engine is not None
        return self._engine
