"""Commands to all replicas: their answers as one, and what a restarted replica must be told."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from tokasaurus.protocol.commands import (
    Command,
    CommandDone,
    CommandFailed,
    FlushCache,
    GroupAction,
    LeaveWeightsGroup,
    UpdateWeights,
)
from tokasaurus.text.replica_answers import merged_answers
from tokasaurus.text.routes import Replica
from tokasaurus.text.standing import Standing

__all__ = ["Broadcasts"]


@dataclass(eq=False, slots=True)
class _Broadcast:
    """The answers to a command that was sent to every replica."""

    command: Command
    awaited: set[int]  # replicas
    answers: dict[int, CommandDone | CommandFailed] = field(default_factory=dict)  # by replica


class Broadcasts:
    """The commands that not all replicas have answered.

    A replica that joins gets the commands that still count under ids of their own, which the text
    core does not know, and then those that are not answered yet.
    """

    def __init__(self) -> None:
        self._table: dict[int, _Broadcast] = {}  # by command id, in the order of sending
        self._standing = Standing()
        self._next_own_id = -1
        self.has_emptied_caches = False  # the last answer says so

    @property
    def needs_first_weights(self) -> bool:
        """Whether the weights that the engine started with still run."""
        return self._standing.needs_first_weights

    def is_awaited(self, replica: Replica) -> bool:
        """Whether the replica has a command to answer."""
        return bool(replica.catching_up) or any(
            replica.number in each.awaited
            for each in self._table.values()
            if not isinstance(each.command.action, GroupAction)  # they wait for a trainer
        )

    def send(self, command: Command, replicas: Iterable[Replica]) -> None:
        """Sends a command. Without replicas it waits for one that joins."""
        broadcast = self._table[command.command_id] = _Broadcast(command, set())
        self._standing.sent(command.action)
        for replica in replicas:
            broadcast.awaited.add(replica.number)
            replica.send(command)

    def join(self, replica: Replica) -> None:
        """Brings a restarted replica to where the others are."""
        replica.obstacle = self._standing.obstacle()
        for action in self._standing.actions():
            if isinstance(action, UpdateWeights) and replica.obstacle is not None:
                continue
            replica.catching_up.add(self._next_own_id)
            replica.send(Command(self._next_own_id, action))
            self._next_own_id -= 1
        for broadcast in self._table.values():
            if isinstance(broadcast.command.action, GroupAction) and broadcast.awaited:
                continue  # the others are on their way already
            broadcast.awaited.add(replica.number)
            replica.send(broadcast.command)

    def absorb(
        self,
        sender: Replica,
        message: CommandDone | CommandFailed,
        replicas: Iterable[Replica] = (),
    ) -> list[CommandDone | CommandFailed]:
        """Takes a replica's answer; returns that of all, if it was the last one.

        Args:
            sender: the replica.
            message: its answer.
            replicas: that live: where one cannot go on in a trainer's group, all leave it.
        """
        self.has_emptied_caches = False
        if message.command_id < 0:
            sender.catching_up.discard(message.command_id)
            if isinstance(message, CommandFailed):
                sender.obstacle = message.reason
            return []
        broadcast = self._table[message.command_id]
        broadcast.answers[sender.number] = message
        if isinstance(broadcast.command.action, UpdateWeights) and isinstance(message, CommandDone):
            sender.obstacle = None
        action = broadcast.command.action
        if isinstance(action, GroupAction) and isinstance(message, CommandFailed):
            for replica in replicas:
                if replica.number in broadcast.awaited and replica is not sender:
                    replica.send(Command(self._next_own_id, LeaveWeightsGroup(action.group)))
                    self._next_own_id -= 1
        return self._answered(message.command_id, sender.number)

    def lost(self, replica: Replica) -> list[CommandDone | CommandFailed]:
        """The replica answers no more, and its answers do not count."""
        answers: list[CommandDone | CommandFailed] = []
        for command_id, broadcast in list(self._table.items()):
            broadcast.answers.pop(replica.number, None)
            if replica.number in broadcast.awaited:
                answers += self._answered(command_id, replica.number)
        return answers

    def _answered(self, command_id: int, replica: int) -> list[CommandDone | CommandFailed]:
        broadcast = self._table[command_id]
        broadcast.awaited.discard(replica)
        if broadcast.awaited or not broadcast.answers:
            return []  # without any answer it waits for a replica that joins
        del self._table[command_id]
        answer = merged_answers(command_id, broadcast.answers)
        if isinstance(answer, CommandDone):
            self._standing.done(broadcast.command)
        self.has_emptied_caches = isinstance(broadcast.command.action, FlushCache | UpdateWeights)
        return [answer]
