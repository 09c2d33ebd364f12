"""Sends commands to the engine and waits for what they did."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from tokasaurus.errors import TokasaurusError
from tokasaurus.protocol.commands import (
    Action,
    CommandDone,
    JoinWeightsGroup,
    Pause,
    PauseMode,
    ReceiveWeights,
    ReleaseMemory,
    RestoreMemory,
    UpdateWeights,
)
from tokasaurus.server.errors import CommandTimeout
from tokasaurus.server.state import EngineState
from tokasaurus.text.commands import Commands, OnDone

__all__ = ["CommandRunner"]

T = TypeVar("T")

_QUICK_S = 60.0
_WEIGHTS_S = 600.0  # reading and checking weights, and allocating memory
_DRAIN_S = 3600.0  # the longest sequence that has begun


class CommandRunner:
    """Runs commands for routes.

    A command goes on when its client disconnects or its time is up.

    Args:
        state: of the engine.
    """

    def __init__(self, state: EngineState) -> None:
        self._state = state

    @property
    def commands(self) -> Commands:
        """What the commands have made of the engine. Raises EngineError if it cannot serve."""
        return self._state.engine().generations.commands

    async def run(self, *actions: Action) -> list[CommandDone]:
        """Runs commands, each when the one before it is done, and waits for all of them.

        Raises:
            RequestError: the engine refuses one; names the field of the action. The others behind
                it are not sent.
            Conflict: the state of the engine forbids one.
            EngineError: the engine is not ready, or has died.
            CommandTimeout: their time is up.
        """
        self._state.check()
        return await _within(max(map(_limit_s, actions)), self._in_turn(actions))

    async def run_while_serving(self, action: Action) -> CommandDone:
        """Runs a command that may wait for others; a shutdown does not wait for it.

        Raises:
            EngineNotReady: the engine shuts down meanwhile.
            TokasaurusError: as of ``run``.
        """
        task = asyncio.ensure_future(self.run(action))
        with self._state.waiting(task):
            (done,) = await task
        return done

    async def _in_turn(self, actions: Sequence[Action]) -> list[CommandDone]:
        results = []
        for action in actions:
            answer, on_done = _future()
            self._state.engine().generations.command(action, on_done)
            results.append(await answer)
        return results

    async def update_weights(
        self,
        files: Sequence[str],
        on_done: OnDone,
        *,
        checksums: Sequence[str] = (),
        label: str | None = None,
        are_received: bool = False,
    ) -> CommandDone:
        """Replaces the weights; raises what ``run`` raises.

        Args:
            files: as for ``Generations.update_weights``.
            on_done: called with the result, also when nothing waits for it any more.
            checksums: of the files.
            label: of the new version.
            are_received: as for ``Generations.update_weights``.
        """
        generations = self._state.engine().generations
        answer, settle = _future()

        def done(result: CommandDone | TokasaurusError) -> None:
            on_done(result)
            settle(result)

        generations.update_weights(
            files, done, checksums=checksums, label=label, are_received=are_received
        )
        return await _within(_WEIGHTS_S, answer)


def _limit_s(action: Action) -> float:
    if isinstance(action, Pause):
        return _DRAIN_S if action.mode is PauseMode.DRAIN else _QUICK_S
    # Their own limits come first. Each step of joining may take as long.
    if isinstance(action, JoinWeightsGroup):
        return 2 * action.timeout_s + _QUICK_S
    if isinstance(action, ReceiveWeights):
        return action.timeout_s + _QUICK_S
    is_slow = isinstance(action, UpdateWeights | ReleaseMemory | RestoreMemory)
    return _WEIGHTS_S if is_slow else _QUICK_S


def _future() -> tuple[
    asyncio.Future[CommandDone], Callable[[CommandDone | TokasaurusError], None]
]:
    """A future, and what gives it its result."""
    answer: asyncio.Future[CommandDone] = asyncio.get_running_loop().create_future()

    def settle(result: CommandDone | TokasaurusError) -> None:
        if answer.done():  # nothing waits for it any more
            return
        if isinstance(result, CommandDone):
            answer.set_result(result)
        else:
            answer.set_exception(result)

    return answer, settle


async def _within(limit_s: float, work: Awaitable[T]) -> T:
    """What the work returns. It goes on when the caller is cancelled, or the time is up."""
    task = asyncio.ensure_future(work)
    _going_on.add(task)
    task.add_done_callback(_ended)
    await asyncio.wait({task}, timeout=limit_s)
    if not task.done():
        raise CommandTimeout(limit_s)
    return task.result()


# The event loop itself does not keep tasks alive.
_going_on: set[asyncio.Future[Any]] = set()


def _ended(task: asyncio.Future[Any]) -> None:
    _going_on.discard(task)
    if not task.cancelled():
        task.exception()  # nothing may wait for it any more, which is not worth a warning
