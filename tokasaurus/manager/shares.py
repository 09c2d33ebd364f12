"""Fair shares: where the sequences of each client come in the order.

Within a priority, the order is that of a *virtual time*, which counts work in tokens: the prompt of
a request, and the tokens that its samples are predicted to generate. A client's sequences follow
one another in the order in which they came, each after the work of the one before it::

    virtual time     ─────────────────────────────────────────────────────▶
    client A         ├─ A1 ─┼─ A2 ─┼─ A3 ─┼─ A4 ─┼─ A5 ─┼─ A6 ─┼ ...
    client B                      ├B1┼B2┼B3┼
                                  ▲ the present when B came: A1 to A4 were running
    order            A1 A2 B1 A3 B2 B3 A4 A5 ...      by the beginnings

The first sequence of a client that has none comes at the *present*: the middle of what runs. So it
comes before all that has not begun, and before half of what runs. This is start-time fair queueing
(P. Goyal, H. M. Vin, H. Cheng, SIGCOMM 1996), with a present for a server of many at once.

Places are kept until a sequence ends. They are given anew, from the present on and with each
client's sequences in their order, to all that does not run, if clients share the priority and

- the predictions have changed by a quarter, or
- the present has gone back far, since more ran than could go on.

With one client, the order is that of arrival. With several, no sequence starves: the present moves
on as sequences run, so the number of those that come before any place is limited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from tokasaurus.manager.order import first_order, priority_of, time_of
from tokasaurus.manager.sequence import Request, Sequence
from tokasaurus.manager.slots import SlotTable

__all__ = ["Shares", "middle"]

_LONG = 1 << 30  # a max_tokens that limits no sequence
_START = 1 << 30  # the first virtual time, so that there are places before it
_NEW_MEAN = 1.25  # by this factor, predictions have become others
_REVIEW_INTERVAL = 16  # steps
_NUM_LATE = 8  # mean sequences


@dataclass(eq=False, slots=True)
class _Client:
    """A client with sequences of one priority that have not ended."""

    number: int  # in the slot table
    num_sequences: int = 0
    end: int = _START  # the virtual time at which the work of its sequences ends


@dataclass(eq=False, slots=True)
class _Level:
    """What clients have of one priority."""

    mean_tokens: float  # predicted when its sequences were placed
    clients: dict[str, _Client] = field(default_factory=dict)
    times: set[int] = field(default_factory=set)  # of its sequences, each of which has its own
    present: int = _START
    read_at: int = -1  # the step at which the present was read
    latest: int = _START  # the latest present at which sequences were placed


class Shares:
    """The places of all sequences that have not ended.

    Args:
        middle: the virtual time in the middle of what runs at a priority; None if nothing does.
        predict: how many tokens a sequence with this ``max_tokens`` generates in the mean.
    """

    def __init__(
        self, middle: Callable[[int], int | None], predict: Callable[[int], float]
    ) -> None:
        self._middle = middle
        self._predict = predict
        # By max_tokens, in this step: requests that come together mostly agree.
        self._predicted: dict[int, int] = {}
        self._levels: dict[int, _Level] = {}  # by priority
        self._shared: set[int] = set()  # priorities of several clients
        self.num_numbers = 0  # of clients, each less than this
        self._free_numbers: list[int] = []
        self._step = 0

    def num_clients(self, priority: int) -> int:
        """Clients that have sequences of this priority; 1 where there are none."""
        return len(self._levels[priority].clients) if priority in self._shared else 1

    @property
    def num_sequences(self) -> int:
        """Places that are taken."""
        return sum(len(level.times) for level in self._levels.values())

    def pass_step(self) -> None:
        """The first batch of a step was planned."""
        self._step += 1
        self._predicted.clear()

    def outdated(self) -> list[int]:
        """The priorities at which places are to be given anew."""
        outdated: list[int] = []
        for priority in self._shared:
            level, mean_tokens = self._levels[priority], self._predict(_LONG)
            ratio = mean_tokens / level.mean_tokens
            is_outdated = not 1 / _NEW_MEAN <= ratio <= _NEW_MEAN
            if self._step % _REVIEW_INTERVAL == 0:
                late = level.latest - self._present(priority, level)
                is_outdated |= late > _NUM_LATE * mean_tokens
            if is_outdated:
                outdated.append(priority)
        return outdated

    def enter(self, request: Request) -> None:
        """Gives the sequences of a new request their places."""
        message = request.message
        level = self._levels.get(message.priority)
        if level is None:
            level = self._levels[message.priority] = _Level(self._predict(_LONG))
        client = level.clients.get(message.client)
        if client is None:
            client = level.clients[message.client] = _Client(self._new_number())
        client.num_sequences += len(request.sequences)
        request.client = client.number
        if len(level.clients) > 1:
            self._shared.add(message.priority)
            present = self._present(message.priority, level)
            client.end = max(client.end, present)
            level.latest = max(level.latest, present)
        self._place(level, client, request, request.sequences.values())

    def place_anew(self, priority: int, requests: Iterable[Request]) -> None:
        """Places the sequences that do not run as if they came now.

        Args:
            priority: of which.
            requests: all, in the order in which they came.
        """
        level = self._levels[priority]
        level.mean_tokens = self._predict(_LONG)
        waiting: list[tuple[Request, list[Sequence]]] = []
        for request in requests:
            if request.message.priority == priority:
                sequences = [each for each in request.sequences.values() if each.slot < 0]
                waiting.append((request, sequences))
                level.times.difference_update(time_of(each.order) for each in sequences)
        level.latest = present = self._present(priority, level)
        for client in level.clients.values():
            client.end = present
        # Of clients that are placed at the same time, the one with the fewest sequences is first.
        waiting.sort(key=lambda each: level.clients[each[0].message.client].num_sequences)
        for request, sequences in waiting:
            self._place(level, level.clients[request.message.client], request, sequences)

    def move_before(self, sequence: Sequence, other: Sequence) -> bool:
        """Places a sequence directly before another one of its priority.

        Returns:
            Whether there is a place.
        """
        message = sequence.request.message
        times = self._levels[message.priority].times
        time = time_of(other.order) - 1
        while time in times:
            time -= 1
        if time < 0:
            return False
        times.remove(time_of(sequence.order))
        times.add(time)
        sequence.order = first_order(message.priority) + time
        return True

    def leave(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        message = sequence.request.message
        level = self._levels[message.priority]
        level.times.discard(time_of(sequence.order))
        client = level.clients[message.client]
        client.num_sequences -= 1
        if not client.num_sequences:
            del level.clients[message.client]
            self._free_numbers.append(client.number)
            if len(level.clients) == 1:
                self._shared.discard(message.priority)
            if not level.clients:
                del self._levels[message.priority]

    def _present(self, priority: int, level: _Level) -> int:
        if level.read_at != self._step:
            level.read_at = self._step
            present = self._middle(priority)
            level.present = level.present if present is None else present
        return level.present

    def _place(
        self, level: _Level, client: _Client, request: Request, sequences: Iterable[Sequence]
    ) -> None:
        """Gives sequences the places behind those that the client has."""
        message, times = request.message, level.times
        base = first_order(message.priority)
        each = self._predicted.get(message.max_tokens)
        if each is None:
            each = self._predicted[message.max_tokens] = round(self._predict(message.max_tokens))
        end, before, extra = client.end, -1, len(message.prompt_ids)
        for sequence in sequences:
            time = max(end, before + 1)
            while time in times:
                time += 1
            times.add(time)
            sequence.order = base + time
            sequence.num_predicted = each + extra
            end += each + extra
            before, extra = time, 0  # the samples share the prompt
        client.end = max(end, before + 1)

    def _new_number(self) -> int:
        if self._free_numbers:
            return self._free_numbers.pop()
        self.num_numbers += 1
        return self.num_numbers - 1


def middle(slots: SlotTable, priority: int) -> int | None:
    """The virtual time that half of the sequences that run at this priority have not reached.

    None if none runs. Each has advanced by the tokens that it has, but at most by half of its
    predicted work: predictions may be wrong by much.
    """
    level = priority_of(first_order(priority))
    rows = (priority_of(slots.order) == level).nonzero()[0]
    if not rows.size:
        return None
    advance = np.minimum(slots.length[rows], slots.num_predicted[rows] // 2)
    times = time_of(slots.order[rows]) + advance
    half = (rows.size - 1) // 2
    return int(np.partition(times, half)[half])
