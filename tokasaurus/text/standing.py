"""What the answered commands have made of the engine, for a replica that starts anew."""

from __future__ import annotations

from tokasaurus.protocol.commands import (
    Action,
    Command,
    LoadCartridge,
    Pause,
    PauseMode,
    ReleaseMemory,
    RestoreMemory,
    Resume,
    UnloadCartridge,
    UpdateWeights,
)
from tokasaurus.receipts.weights import StampedFile, stamped

__all__ = ["Standing"]


class Standing:
    """Remembers the commands that still count.

    New weights are remembered as files. A replica that starts anew reads them again, if they are
    still what they were when the update was sent.
    """

    def __init__(self) -> None:
        self._paused_by = -1  # the latest command that paused or resumed
        self._is_paused = False
        self._released: set[str] = set()
        self._cartridges: dict[str, LoadCartridge] = {}
        self._update: UpdateWeights | None = None
        self._stamps: dict[int, list[StampedFile]] = {}  # by version, until it is outdated

    def sent(self, action: Action) -> None:
        """The replicas are about to get a command."""
        if isinstance(action, UpdateWeights):
            self._stamps[action.version] = stamped(action.files)

    def done(self, command: Command) -> None:
        """All replicas have carried out a command."""
        action = command.action
        if isinstance(action, Pause | Resume) and command.command_id > self._paused_by:
            # A drain may be answered after the Resume that ended it.
            self._paused_by, self._is_paused = command.command_id, isinstance(action, Pause)
        elif isinstance(action, ReleaseMemory):
            self._released |= _kinds(action)
        elif isinstance(action, RestoreMemory):
            self._released -= _kinds(action)
        elif isinstance(action, LoadCartridge):
            self._cartridges[action.name] = action
        elif isinstance(action, UnloadCartridge):
            self._cartridges.pop(action.name, None)
        elif isinstance(action, UpdateWeights):
            self._adopt(action)

    def _adopt(self, update: UpdateWeights) -> None:
        self._released.discard("weights")
        if self._update is None or update.version > self._update.version:
            self._update = update
            for version in [each for each in self._stamps if each < update.version]:
                del self._stamps[version]

    @property
    def needs_first_weights(self) -> bool:
        """Whether the weights that the engine started with still run."""
        return self._update is None

    def actions(self) -> list[Action]:
        """What brings a replica from its start to where the others are, in order."""
        actions: list[Action] = [Pause(PauseMode.KEEP)] if self._is_paused else []
        if self._update is not None:
            actions.append(self._update)
        actions += self._cartridges.values()
        if self._released:
            actions.append(ReleaseMemory("weights" in self._released, "kv_cache" in self._released))
        return actions

    def obstacle(self) -> str | None:
        """Why no replica can get the present weights any more; None if one can."""
        if self._update is None:
            return None
        if self._update.is_received:
            return (
                f"its weights would be those of version {self._update.version}, which came from a"
                " trainer; it waits for the next update of the weights"
            )
        known = self._stamps[self._update.version]
        changed = next(
            (
                before.path
                for before, now in zip(known, stamped(self._update.files), strict=True)
                if before != now
            ),
            None,
        )
        if changed is None:
            return None
        return (
            f"its weights would be those of version {self._update.version}, and {changed} is not"
            " what it was at the update; it waits for the next update of the weights"
        )


def _kinds(action: ReleaseMemory | RestoreMemory) -> set[str]:
    return {name for name in ("weights", "kv_cache") if getattr(action, name)}
