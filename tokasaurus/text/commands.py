"""The commands that the engine has not answered yet, and what the answered ones have made of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

from tokasaurus.errors import Conflict, RequestError, TokasaurusError
from tokasaurus.protocol.commands import (
    Action,
    Command,
    CommandDone,
    CommandFailed,
    GroupAction,
    Pause,
    PauseMode,
    ReleaseMemory,
    RestoreMemory,
    Resume,
    UpdateWeights,
)
from tokasaurus.text.weights_versions import WeightsVersions

__all__ = ["MEMORY_KINDS", "PAUSE_MODES", "Commands", "OnDone"]

PAUSE_MODES: Mapping[str, PauseMode] = {
    "abort": PauseMode.ABORT,
    "wait": PauseMode.DRAIN,
    "keep": PauseMode.KEEP,
}
"""What a pause does with the requests in flight, in vLLM's words."""

MEMORY_KINDS = ("weights", "kv_cache")
"""What memory can be released, in the words of vLLM and SGLang."""

OnDone: TypeAlias = Callable[[CommandDone | TokasaurusError], None]
"""Called once, with what a command did, or with an error."""


class Commands:
    """The table of commands.

    Args:
        send: gives a message to the manager; must not block.

    Attributes:
        is_paused: the last Pause is done, and no Resume since.
        wake_resumes: a sleep has paused the engine, so waking it up resumes it.
        released: the kinds of memory that are released: "weights", "kv_cache".
        lacks_weights: the weights were released, could not be read again, and wait for an update.
        weights: the versions of the weights.
    """

    def __init__(self, send: Callable[[Command], None]) -> None:
        self.is_paused = False
        self.wake_resumes = False
        self.released: frozenset[str] = frozenset()
        self.lacks_weights = False
        self.weights = WeightsVersions()
        self._send = send
        self._next_id = 0
        self._paused_by = -1  # the latest answered command that paused or resumed
        self._unanswered: dict[int, tuple[Action, OnDone]] = {}

    @property
    def hold_everything(self) -> bool:
        """Whether requests can only go on after a command that has not been sent yet."""
        rests = self.is_paused or self.lacks_weights or bool(self.released)
        return rests and not self.num_unanswered

    @property
    def num_unanswered(self) -> int:
        """Commands that were sent and have no answer yet; not those that wait for a trainer."""
        return sum(not isinstance(each, GroupAction) for each, _ in self._unanswered.values())

    def submit(self, action: Action, on_done: OnDone) -> None:
        """Sends a command."""
        command_id = self._next_id
        self._next_id += 1
        self._unanswered[command_id] = (action, on_done)
        self._send(Command(command_id, action))

    def absorb(self, message: CommandDone | CommandFailed) -> None:
        """Takes the answer to a command."""
        action, on_done = self._unanswered.pop(message.command_id)
        if isinstance(message, CommandDone):
            self._note(message, action)
            on_done(message)
            return
        field = message.field
        if isinstance(action, UpdateWeights):
            self.weights.drop(action.version, is_taken=message.is_partial)
            if "weights" not in self.released and not action.is_received:
                field = field or "files"  # the worker refuses nothing else
        # Where no field is wrong, the state of the engine forbids the command.
        on_done(Conflict(message.reason) if field is None else RequestError(message.reason, field))

    @contextlib.contextmanager
    def falling_asleep(self) -> Iterator[None]:
        """Surrounds the commands of a sleep: ``wake_resumes`` is set, unless one is refused."""
        before = self.wake_resumes
        self.wake_resumes |= not self.is_paused
        try:
            yield
        except RequestError:
            self.wake_resumes = before
            raise

    def fail_all(self, error: TokasaurusError) -> None:
        """The engine is gone: ends every command with this error."""
        unanswered, self._unanswered = self._unanswered, {}
        for _, on_done in unanswered.values():
            on_done(error)

    def _note(self, done: CommandDone, action: Action) -> None:
        if isinstance(action, ReleaseMemory | RestoreMemory | UpdateWeights):
            self.lacks_weights = done.lacks_weights
        if isinstance(action, Pause | Resume) and done.command_id > self._paused_by:
            # A drain may be answered after the Resume that ended it.
            self.is_paused, self._paused_by = isinstance(action, Pause), done.command_id
            self.wake_resumes &= self.is_paused
        elif isinstance(action, ReleaseMemory):
            self.released |= _kinds(action)
        elif isinstance(action, RestoreMemory):
            self.released -= _kinds(action)
        elif isinstance(action, UpdateWeights):
            self.released -= {"weights"}
            self.weights.adopt(action.version)


def _kinds(action: ReleaseMemory | RestoreMemory) -> frozenset[str]:
    return frozenset(kind for kind in MEMORY_KINDS if getattr(action, kind))
