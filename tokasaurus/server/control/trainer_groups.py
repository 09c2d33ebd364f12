"""New weights that a trainer broadcasts in a process group, in which workers are.

Tensors come in several messages, and replace the weights when all of the model have come::

    joined ──receive──▶ some tensors ──receive──▶ all ──commit──▶ new weights
      ▲                      │ a failure: the group is left, and the tensors are dropped
      └── join ──────────────┘
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from tokasaurus.errors import Conflict, TokasaurusError
from tokasaurus.protocol.commands import (
    CommandDone,
    JoinWeightsGroup,
    LeaveWeightsGroup,
    ReceiveWeights,
)
from tokasaurus.server.control.commands import CommandRunner
from tokasaurus.server.control.weights_updates import WeightsUpdates

__all__ = ["Tensors", "TrainerGroups"]


@dataclass(frozen=True)
class Tensors:
    """What a trainer is about to broadcast, in order.

    Attributes:
        is_flat: in one broadcast: the bytes of one behind those of the other.
    """

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    is_flat: bool = False


class TrainerGroups:
    """The groups of one engine, and the update that comes through them.

    Args:
        runner: sends commands to the engine.
        updates: the weights that came over HTTP; their files go when others replace them.
    """

    def __init__(self, runner: CommandRunner, updates: WeightsUpdates) -> None:
        self._runner = runner
        self._updates = updates
        self._is_begun = False  # some tensors of an update have come
        self._awaits_finish = False  # the client says when the update has all tensors
        self._label: str | None = None
        self._num_joins = 0

    async def join(self, action: JoinWeightsGroup) -> None:
        """Joins a group, in which all ranks are then. An update that was begun before is dropped.

        Raises:
            RequestError: the engine cannot be in such a group.
            Conflict: the others did not come in time.
        """
        self._is_begun = self._awaits_finish = False
        self._num_joins += 1
        await self._run(action.group, action)

    async def leave(self, group: str) -> None:
        """Leaves a group, and drops tensors that have come; harmless if there is none."""
        self._is_begun = self._awaits_finish = False
        with contextlib.suppress(TokasaurusError):  # the engine may be gone
            await self._runner.run(LeaveWeightsGroup(group))

    def begin(self) -> None:
        """Begins an update that ``finish`` ends; tensors that have come before are dropped."""
        self._is_begun, self._awaits_finish = False, True

    async def receive(
        self, group: str, tensors: Tensors, label: str | None, timeout_s: float
    ) -> CommandDone:
        """Receives tensors. With the last one of the model, its weights are replaced.

        Args:
            group: the name of one that was joined.
            tensors: that come.
            label: of the new version; None is its number. Another one than that of the tensors
                before begins another update.
            timeout_s: for all of them.

        Returns:
            Of the message with the last tensor, what the update has done.

        Raises:
            RequestError: a tensor does not fit the model.
            Conflict: the trainer is gone, or too slow.
        """
        begins_anew = not self._is_begun or label != self._label
        self._is_begun, self._label = True, label
        action = ReceiveWeights(
            group,
            tensors.names,
            tensors.dtypes,
            tensors.shapes,
            tensors.is_flat,
            begins_anew,
            timeout_s,
        )
        done = await self._run(group, action)
        if done.has_all_tensors and self._is_begun and not self._awaits_finish:
            return await self._commit(label)
        return done

    async def _run(self, group: str, action: JoinWeightsGroup | ReceiveWeights) -> CommandDone:
        """Runs a command. If it fails, the group is left, unless another one is joined by now."""
        joins = self._num_joins
        try:
            return await self._runner.run_while_serving(action)
        except TokasaurusError:
            if joins == self._num_joins:
                await self.leave(group)
            raise

    async def finish(self, label: str | None) -> CommandDone:
        """Replaces the weights, after ``begin``.

        Raises:
            Conflict: tensors are missing, which it names; they may still come.
        """
        if not self._awaits_finish:
            raise Conflict("no update has begun: POST /start_weight_update first")
        done = await self._commit(label)
        self._awaits_finish = False
        return done

    async def _commit(self, label: str | None) -> CommandDone:
        def on_done(result: CommandDone | TokasaurusError) -> None:
            if isinstance(result, CommandDone):
                self._updates.replaced()

        was_begun, self._is_begun = self._is_begun, False  # the next tensors are of another update
        try:
            done = await self._runner.update_weights((), on_done, label=label, are_received=True)
        except TokasaurusError:
            self._is_begun = was_begun
            raise
        return CommandDone(
            done.command_id, weights_version=done.weights_version, has_all_tensors=True
        )
