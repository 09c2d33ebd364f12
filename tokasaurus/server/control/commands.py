"""Sends commands to the engine and waits for what they did."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from tokasaurus.errors import TokasaurusError
from tokasaurus.protocol.commands import (
    Action,
    CommandDone,
    Pause,
    PauseMode,
    ReleaseMemory,
    RestoreMemory,
    UpdateWeights,
)
from tokasaurus.server.errors import CommandTimeout
from tokasaurus.server.state import EngineState
from tokasaurus.text.commands import Commands, OnDone

__all__ = ["CommandRunner"]

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
        """Sends commands, one right behind the other, and waits for all of them.

        Raises:
            RequestError: the engine refuses one; names the field of the action.
            Conflict: the state of the engine forbids one.
            EngineError: the engine is not ready, or has died.
            CommandTimeout: their time is up.
        """
        generations = self._state.engine().generations
        answers = []
        for action in actions:
            answer, on_done = _future()
            generations.command(action, on_done)
            answers.append(answer)
        return await _within(max(map(_limit_s, actions)), answers)

    async def update_weights(
        self,
        files: Sequence[str],
        on_done: OnDone,
        *,
        checksums: Sequence[str] = (),
        label: str | None = None,
    ) -> CommandDone:
        """Replaces the weights; raises what ``run`` raises.

        Args:
            files: as for ``Generations.update_weights``.
            on_done: called with the result, also when nothing waits for it any more.
            checksums: of the files.
            label: of the new version.
        """
        generations = self._state.engine().generations
        answer, settle = _future()

        def done(result: CommandDone | TokasaurusError) -> None:
            on_done(result)
            settle(result)

        generations.update_weights(files, done, checksums=checksums, label=label)
        (result,) = await _within(_WEIGHTS_S, [answer])
        return result


def _limit_s(action: Action) -> float:
    if isinstance(action, Pause):
        return _DRAIN_S if action.mode is PauseMode.DRAIN else _QUICK_S
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


async def _within(
    limit_s: float, answers: Sequence[asyncio.Future[CommandDone]]
) -> list[CommandDone]:
    try:
        return await asyncio.wait_for(asyncio.gather(*answers), limit_s)
    except asyncio.TimeoutError:
        raise CommandTimeout(limit_s) from None
