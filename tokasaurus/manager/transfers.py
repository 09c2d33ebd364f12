"""Transfers of weights that the workers of a replica carry out beside their batches.

A command lets them join the group of a trainer, or receive tensors. The worker answers the control
when it has begun; then each rank reports how it ended. Owns which transfers have not ended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tokasaurus.protocol.commands import (
    GroupAction,
    JoinWeightsGroup,
    LeaveWeightsGroup,
    ReceiveWeights,
    TransferDone,
)

__all__ = ["Transfers"]

# The field of each action that is wrong where its check fails.
_FIELDS = {JoinWeightsGroup: "backend", ReceiveWeights: "names"}


@dataclass
class _Transfer:
    command_id: int
    group: str
    has_begun: bool = False
    reports: dict[int, TransferDone] = field(default_factory=dict)  # by rank

    @property
    def error(self) -> str | None:
        return next((each.error for each in self.reports.values() if each.error), None)

    @property
    def is_over(self) -> bool:
        if not self.has_begun or not self.reports:
            return False
        num_ranks = next(iter(self.reports.values())).num_ranks
        return self.error is not None or len(self.reports) == num_ranks


class Transfers:
    """The transfers of one replica.

    Args:
        done: answers a command; takes whether all tensors have come.
        failed: answers a command; takes the reason and the field.
        leave: lets the workers leave a group.
    """

    def __init__(
        self,
        done: Callable[[int, bool], None],
        failed: Callable[[int, str, str | None], None],
        leave: Callable[[str], None],
    ) -> None:
        self._done, self._failed, self._leave = done, failed, leave
        self._transfers: dict[int, _Transfer] = {}  # by the number of the control

    def sent(self, number: int, command_id: int, action: GroupAction) -> None:
        """A control was sent. One that joins or leaves a group ends what the group does."""
        if not isinstance(action, ReceiveWeights):
            for other, transfer in list(self._transfers.items()):
                if transfer.group == action.group:
                    del self._transfers[other]
                    reason = f"the group {action.group!r} was left meanwhile"
                    self._failed(transfer.command_id, reason, None)
        if not isinstance(action, LeaveWeightsGroup):
            self._transfers[number] = _Transfer(command_id, action.group)

    def answered(
        self, number: int, command_id: int, action: GroupAction, error: str | None
    ) -> None:
        """The worker has answered a control: it has begun, or refuses."""
        transfer = self._transfers.get(number)
        if transfer is None:  # it was left meanwhile, or leaves
            if isinstance(action, LeaveWeightsGroup) and command_id >= 0:
                self._done(command_id, False)
        elif error is not None:
            del self._transfers[number]
            self._failed(transfer.command_id, error, _FIELDS[type(action)])
        else:
            transfer.has_begun = True
            self._finish(number, transfer)

    def reported(self, report: TransferDone) -> None:
        """A rank says how a transfer ended there."""
        transfer = self._transfers.get(report.number)
        if transfer is not None:  # else it failed at another rank, or was left
            transfer.reports[report.rank] = report
            self._finish(report.number, transfer)

    def _finish(self, number: int, transfer: _Transfer) -> None:
        if not transfer.is_over:
            return
        del self._transfers[number]
        if transfer.error is not None:
            self._failed(transfer.command_id, transfer.error, None)
            self._leave(transfer.group)  # the other ranks may still wait
        else:
            is_whole = all(each.has_all_tensors for each in transfer.reports.values())
            self._done(transfer.command_id, is_whole)
