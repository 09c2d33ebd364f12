"""An engine of several processes for a program: the text core here, replicas below a supervisor.

::

    the program ─── text core ──▶ router ──▶ manager ──▶ workers     of each replica,
                        ▲                       │                    in processes of their own
                        └───────────────────────┘

``LLM`` calls ``ReplicatedEngine.step`` in its caller's thread, as it does with an engine in one
process. ``AsyncReplicas`` takes messages in the event loop of ``AsyncLLM``.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import zmq

from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.slices import EngineSlices
from tokasaurus.errors import EngineDead, ModelError
from tokasaurus.launch.doors import TO_SERVER
from tokasaurus.launch.launching import placed
from tokasaurus.launch.lifeline import Assignment, Dead, Lifeline, Lost, Ready, Restored, Start
from tokasaurus.launch.processes import Launcher
from tokasaurus.launch.program_engine import ProgramEngine
from tokasaurus.launch.supervisor import Supervisor
from tokasaurus.launch.text_core import TextCore
from tokasaurus.launch.text_process import TextProcess
from tokasaurus.protocol.channels import Receiver
from tokasaurus.protocol.doors import Door
from tokasaurus.protocol.messages import ToServer, WorkerStall
from tokasaurus.protocol.role import Role
from tokasaurus.server.state import EngineState
from tokasaurus.text.generations import Generations
from tokasaurus.text.preparation import Preparer

__all__ = ["QUIET", "AsyncReplicas", "ReplicatedEngine", "has_processes"]

QUIET: Mapping[str, Any] = {"log_level": "WARNING"}
"""Flags of an engine in a program, unless the program sets them: its processes do not chat."""

_CLOSED = "this engine was closed, or all its replicas have ended"
# How often a step returns without a message, so that Ctrl-C is noticed.
_PATIENCE_S = 0.1


def has_processes(config: EngineConfig) -> bool:
    """Whether an engine has workers in processes of their own: several, or on other machines."""
    return config.dp_size * config.pp_size * config.tp_size > 1 or config.launcher != "local"


class ReplicatedEngine(ProgramEngine):
    """The twin of ``EmbeddedEngine`` with managers and workers in processes of their own.

    All calls come from one thread.

    Args:
        slices: the resolved configuration.
        launcher: starts the processes; None starts them here.

    Raises:
        ModelError: the model cannot be served.
        EngineDead: a process ended before the engine was ready.
    """

    def __init__(self, slices: EngineSlices, launcher: Launcher | None = None) -> None:
        self.config = slices.server
        supervisor = self._supervisor = Supervisor(slices, None, launcher=launcher)
        assignment, lifeline = supervisor.start()
        self._lifeline = lifeline
        # Also called when the program ends without closing the engine.
        self._end = weakref.finalize(self, supervisor.close, lifeline)
        try:
            self._doors = _PolledDoors(lifeline)
            self._core = TextCore(assignment, lifeline, self._doors)
            self.preparer = self._core.load()
            lifeline.send(Ready())
            while not self._core.has_begun:
                self._follow_lifeline()
            self.generations = self._core.begin(self.preparer)
        except BaseException:
            self.close()
            raise

    @property
    def num_generated_tokens(self) -> int:
        """Tokens that all replicas have generated, as of about a second ago."""
        statistics = self.generations.statistics
        return 0 if statistics is None else statistics.num_generated_tokens

    @property
    def num_preemptions(self) -> int:
        """How many times a running sequence was preempted, as of about a second ago."""
        statistics = self.generations.statistics
        return 0 if statistics is None else statistics.num_preemptions

    def manager_pid(self, replica: int) -> int:
        """The process id of a manager, to measure it."""
        return self._supervisor.pid(Role("manager", replica))

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight."""
        return not len(self.generations) and not self.generations.commands.num_unanswered

    @property
    def closed(self) -> bool:
        """Whether it was closed, or all replicas have ended."""
        return not self._end.alive

    def step(self) -> None:
        """Takes the messages that have come; waits for a moment if there are none.

        Raises:
            EngineDead: the engine was closed, or all its replicas have ended; says why.
        """
        if self.closed:
            raise EngineDead(_CLOSED)
        try:
            self._step()
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """Ends the replicas. The engine cannot be used afterwards."""
        self._end()

    def _step(self) -> None:
        replicas, has_notes = self._doors.wait(min(_PATIENCE_S, self._core.check_every_s))
        for replica in replicas:
            self._doors.take(replica, self._core)
        if has_notes:
            self._follow_lifeline()
        self._core.check_if_due()

    def _follow_lifeline(self) -> None:
        for note in self._lifeline.receive() or [Dead("its supervisor ended")]:
            if isinstance(note, Start | Lost | Restored):
                self._core.note(note)
            elif isinstance(note, Dead):
                raise _reason(self._supervisor, note)


class _PolledDoors:
    """Doors that are looked at when the caller has time."""

    def __init__(self, lifeline: Lifeline) -> None:
        self._lifeline = lifeline
        self._open: dict[int, Receiver[ToServer | WorkerStall]] = {}
        self._poller = zmq.Poller()
        self._poller.register(lifeline.fileno(), zmq.POLLIN)

    def open(self, replica: int, door: Door) -> None:
        receiver = self._open[replica] = Receiver(door, TO_SERVER)
        self._poller.register(receiver.socket, zmq.POLLIN)

    def close(self, replica: int) -> list[ToServer | WorkerStall]:
        door = self._open.pop(replica)
        self._poller.unregister(door.socket)
        left = door.receive(0.0)
        door.close()
        return left

    def wait(self, timeout_s: float) -> tuple[list[int], bool]:
        """Waits for messages; returns the replicas that sent some, and whether there are notes."""
        ready = dict(self._poller.poll(round(timeout_s * 1000)))
        replicas = [replica for replica, door in self._open.items() if door.socket in ready]
        return replicas, self._lifeline.fileno() in ready

    def take(self, replica: int, core: TextCore) -> None:
        """Passes on what has come from a replica."""
        for message in self._open[replica].receive(0.0):
            core.take(replica, message)


class AsyncReplicas:
    """The twin of ``EngineThread`` with managers and workers in processes of their own.

    Args:
        config: the user's choices.
        state: follows the engine: it is ready once the model is loaded, and dies with it.

    Attributes:
        supervisor: of the processes; None before these are started.
    """

    def __init__(self, config: EngineConfig, state: EngineState) -> None:
        self._config = config
        self._state = state
        self.supervisor: Supervisor | None = None
        self._loop = asyncio.get_running_loop()
        self._loaded: asyncio.Future[ProgramEngine] = self._loop.create_future()
        self._task = self._loop.create_task(self._run())

    async def engine(self) -> ProgramEngine:
        """The engine, when its model is loaded.

        Raises:
            ConfigError: the flags contradict one another, the model or the machine.
            ModelError: the model cannot be found or served.
            EngineDead: a process ended before the engine was ready.
            RuntimeError: another event loop asks.
        """
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("this engine belongs to the event loop that it was first used in")
        return await asyncio.shield(self._loaded)

    async def close(self) -> None:
        """Ends everything in flight with ``EngineDead``, and returns when all processes ended."""
        self._state.die("it was closed")
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        try:
            await self._serve()
        except asyncio.CancelledError:
            self._fail(EngineDead("it was closed"))
            raise
        except Exception as error:
            self._fail(error)

    async def _serve(self) -> None:
        slices, launcher = await self._placed()
        supervisor = self.supervisor = Supervisor(slices, None, launcher=launcher)
        assignment, lifeline = supervisor.start()
        # Also called when the program ends without closing the engine.
        end = weakref.finalize(self, supervisor.close, lifeline)
        process = _InProgram(assignment, lifeline, self._state, self._loaded)
        process.watch()
        try:
            ring = asyncio.create_task(process.run_ring())
            dead = asyncio.create_task(process.dead.wait())
            tasks = {ring, dead}
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
            if process.reason is not None:
                raise _reason(supervisor, Dead(process.reason))
            ring.result()  # raises what ended it
        finally:
            process.unwatch()
            await asyncio.shield(asyncio.to_thread(end))

    async def _placed(self) -> tuple[EngineSlices, Launcher]:
        """The same as ``placed``, in a thread, which goes on if this is cancelled."""
        placing = self._loop.run_in_executor(None, placed, self._config)
        try:
            return await asyncio.shield(placing)
        except asyncio.CancelledError:
            placing.add_done_callback(_close_launcher)
            raise

    def _fail(self, error: BaseException) -> None:
        self._state.die(str(error))
        if not self._loaded.done():
            self._loaded.set_exception(error)
            self._loaded.exception()  # it may be that nothing waits for it


class _InProgram(TextProcess):
    """The text core in a program's event loop."""

    def __init__(
        self,
        assignment: Assignment,
        lifeline: Lifeline,
        state: EngineState,
        loaded: asyncio.Future[ProgramEngine],
    ) -> None:
        super().__init__(assignment, lifeline, state)
        self.dead = asyncio.Event()
        self.reason: str | None = None
        self._loaded = loaded

    async def on_ready(self, preparer: Preparer, generations: Generations) -> None:
        engine = ProgramEngine()
        engine.config, engine.preparer, engine.generations = self.config, preparer, generations
        engine.cartridges = self.cartridges
        if not self._loaded.done():
            self._loaded.set_result(engine)

    def on_dead(self, reason: str) -> None:
        self.reason = reason
        self.dead.set()

    def on_stop(self) -> None:
        self.on_dead("it was stopped")


def _close_launcher(placing: asyncio.Future[tuple[EngineSlices, Launcher]]) -> None:
    """Gives back the places that were found when nobody wanted them any more."""
    if not placing.cancelled() and placing.exception() is None:
        threading.Thread(target=placing.result()[1].close).start()


def _reason(supervisor: Supervisor, note: Dead) -> Exception:
    failure = supervisor.failure
    if failure is not None and failure.is_final:
        return ModelError(failure.summary)
    return EngineDead(note.reason)
