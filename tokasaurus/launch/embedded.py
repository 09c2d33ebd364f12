"""An engine in one process: text core, manager and worker, which run when ``step`` is called.

::

                  ┌────────────────── send ◀───────────────┐
                  ▼                                        │
     inbox ──▶ manager ──▶ deliver ──▶ generations ──▶ its callers
       ▲          └──▶ worker ──┐
       └──────── results ───────┘

``LLM`` calls ``step`` in its caller's thread, ``EngineThread`` in a thread of its own. The engine
knows no threads and no clients.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from tokasaurus.config.slices import EngineSlices
from tokasaurus.errors import EngineDead
from tokasaurus.launch.program_engine import ProgramEngine
from tokasaurus.manager.manager import Manager
from tokasaurus.model.worker.pending import Pending
from tokasaurus.model.worker.worker import Worker
from tokasaurus.protocol.messages import FromServer, FromWorker, ToServer
from tokasaurus.text.generations import Generations, Watcher
from tokasaurus.text.preparation import Preparer
from tokasaurus.text.receipts import Receipts
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["EmbeddedEngine"]

log = logging.getLogger(__name__)


class EmbeddedEngine(ProgramEngine):
    """The rooms of one engine, connected without processes.

    ``send`` and ``wake`` may be called from any thread, ``step`` and ``close`` from one. The text
    core belongs to the thread that its messages are delivered in.

    Args:
        slices: the resolved configuration, of one replica.
        steps_ahead: the most batches in flight. With one, every batch is finished before the next
            is planned, and no token is computed after a stop; with more, a device works while the
            host plans.
        deliver: takes the messages of each turn for the text core, before the turn's batches run;
            None absorbs them at once.
        watcher: observes every prompt, for statistics.

    Attributes:
        manager: plans the batches.

    Raises:
        ConfigError: the configuration cannot run on this machine.
        ModelError: the model cannot be served.
    """

    def __init__(
        self,
        slices: EngineSlices,
        *,
        steps_ahead: int = 1,
        deliver: Callable[[list[ToServer]], None] | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        (replica,) = slices.replicas
        self.config = config = slices.server
        tokenizer = Tokenizer.load(config)
        for line in slices.idle_flags:
            log.warning("%s", line)
        log.info("%s", slices.dtype_plan)
        log.info("%s", slices.memory_plan.line)
        # Without an end-of-sequence id no text is ever complete, and the preparer refuses grammars.
        load_vocabulary = partial(tokenizer.vocabulary, config.eos_token_ids)
        # The caller's process may use a device already: the worker joins it there.
        worker = replace(replica.workers[0], device_index=None)
        self._worker: Worker | None = Worker(
            worker, load_vocabulary if config.eos_token_ids else None
        )
        self._worker.warm_up()
        self.manager = Manager(
            replace(
                replica.manager,
                num_pages=self._worker.num_pages,
                scheduling_steps_ahead=steps_ahead,
            )
        )
        self._inbox: deque[FromServer | FromWorker] = deque()
        self._arrived = threading.Event()  # since the last step began
        self._in_flight: deque[Pending] = deque()  # oldest first
        self._deliver = deliver or self._absorb
        receipts = Receipts(config, tokenizer)
        receipts.adopt([self._worker.identity()])
        self.preparer = Preparer(config, tokenizer, receipts)
        self.generations = Generations(config, tokenizer, self.send, watcher, receipts)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens generated so far."""
        return self.manager.counters.num_generated_tokens

    @property
    def num_preemptions(self) -> int:
        """How many times a running sequence was preempted."""
        return self.manager.counters.num_preemptions

    # --- the loop ---------------------------------------------------------------------------------

    def send(self, message: FromServer) -> None:
        """Gives the manager a message, for its next turn."""
        self._inbox.append(message)
        self._arrived.set()

    def wake(self) -> None:
        """Ends a ``wait`` without a message."""
        self._arrived.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until ``step`` has something to do; returns whether it does."""
        return bool(self._inbox or self._in_flight) or self._arrived.wait(timeout_s)

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight and no message waits."""
        return not self._inbox and self.manager.idle

    @property
    def closed(self) -> bool:
        """Whether it was closed, or a step failed."""
        return self._worker is None

    def step(self) -> None:
        """Takes one turn of the manager, submits its batches, and collects the oldest in flight.

        A step that fails ends the engine: the state of its worker is behind the manager's, so no
        further batch could be right.

        Raises:
            EngineDead: the engine was closed, or a former step failed.
            EngineError: a batch failed; names it.
        """
        if self._worker is None:
            raise EngineDead("this engine was closed, or one of its batches failed")
        try:
            self._step(self._worker)
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """Frees the model and the cache. The engine cannot be used afterwards."""
        self._in_flight.clear()
        self._worker = None

    def _step(self, worker: Worker) -> None:
        actions = self.manager.take_turn(self._events(), time.monotonic())
        if actions.messages:
            self._deliver(actions.messages)
        for order in actions.to_worker:
            self._in_flight.append(worker.submit(order))
        if self._in_flight:
            self._inbox.append(self._in_flight.popleft().collect())
        while self._in_flight and self._in_flight[0].is_done:
            self._inbox.append(self._in_flight.popleft().collect())

    def _events(self) -> list[FromServer | FromWorker]:
        self._arrived.clear()  # before the messages are taken, so that none is slept through
        events = []
        while self._inbox:
            events.append(self._inbox.popleft())
        return events

    def _absorb(self, messages: list[ToServer]) -> None:
        for message in messages:
            self.generations.absorb(message)
