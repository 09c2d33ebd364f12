"""The backlog: requests that live, and their sequences that do not run.

Owns the request table, the queue, and the followers. One sample of a request is in the queue, the
*leader*. Its *followers* fork from it when it has fed the prompt that they share. These also wait
outside the queue:

- a preempted sequence, until the server acknowledges enough of its tokens;
- a sequence that needs pages that the prompt of another request is computing;
- a sequence whose cartridge is being written;
- in a drain, a sequence that has not begun.

The queue is in order of priority, and within one as the ``shares`` of clients say. The preempted
sequences of a client come before those of its priority that were never admitted, without a rule of
their own. Knows nothing of slots and pages.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import islice, takewhile

import numpy as np

from tokasaurus.manager.kv.cartridges import Cartridge
from tokasaurus.manager.order import NO_ORDER
from tokasaurus.manager.progress import reads_whole_prompt
from tokasaurus.manager.sequence import GeneratedTokens, Request, Sequence, SequenceState
from tokasaurus.manager.shares import Shares
from tokasaurus.protocol.messages import GenerateRequest, Progress

__all__ = ["Backlog"]


class Backlog:
    """Requests by id, and the queue of their waiting sequences.

    Args:
        stop_lag: tokens that may be planned beyond what the server acknowledged.
        shares: the places of sequences in the order.
    """

    def __init__(self, stop_lag: int, shares: Shares) -> None:
        self.shares = shares
        self.requests: dict[int, Request] = {}
        self.num_sequences = 0  # of all requests that have not ended
        self._stop_lag = stop_lag
        self._num_arrived = 0
        # (order, arrival, sequence); entries of sequences that ended or were parked stay until they
        # surface.
        self._heap: list[tuple[int, int, Sequence]] = []
        self._num_stale = 0
        # In a drain: sequences that would be in the queue if they had begun.
        self._holds_back = False
        self._held: dict[Sequence, None] = {}

    def __len__(self) -> int:
        """Sequences in the queue."""
        return len(self._heap) - self._num_stale

    def add(
        self, message: GenerateRequest, now: float, cartridge: Cartridge | None = None
    ) -> Request:
        """Takes in a request that can run.

        Samples that have generated tokens elsewhere enter as if they had been preempted here.

        Args:
            message: of the server.
            now: the time of its arrival.
            cartridge: that comes before its prompt.
        """
        prompt_ids = message.prompt_ids
        if cartridge is not None:
            prompt_ids = np.concatenate([cartridge.ids, prompt_ids])
        request = Request(message, now, prompt_ids, cartridge)
        self.requests[message.request_id] = request
        progress, brings_prompt = message.progress, reads_whole_prompt(message)
        request.sequences = {
            sample_index: Sequence(
                request=request,
                sample_index=sample_index,
                arrival=self._num_arrived + sample_index,
                prompt_ids=prompt_ids,
                state=SequenceState.FOLLOWING,
                whole_prompt_due=sample_index == 0 and brings_prompt,
            )
            for sample_index in (
                range(message.n) if progress is None else progress.sample_indices.tolist()
            )
        }
        self.shares.enter(request)
        request.followers = dict(reversed(request.sequences.items()))
        begun = [] if progress is None else _give_tokens(request, progress)
        for sequence in begun:
            del request.followers[sequence.sample_index]
        self._next_leads(request)
        self._num_arrived += message.n
        self.num_sequences += len(request.sequences)
        for sequence in begun:
            self.resume(sequence)
        return request

    def review_places(self) -> None:
        """Places waiting sequences anew where clients share and predictions have changed."""
        outdated = self.shares.outdated()
        for priority in outdated:
            self.shares.place_anew(priority, self.requests.values())
        if outdated:
            self._sort()

    def move_to_head(self, sequence: Sequence) -> bool:
        """Makes a sequence of the queue its head. Returns False where no place is left."""
        head = self.head()
        if head is None or head is sequence:
            return head is not None
        if not self.shares.move_before(sequence, head):
            return False
        self._sort()
        return True

    def find(self, request_id: int, sample_index: int) -> Sequence | None:
        """The sequence of that name; None if it has ended or never existed."""
        request = self.requests.get(request_id)
        return request.sequences.get(sample_index) if request else None

    def head(self) -> Sequence | None:
        """The first sequence of the queue; None if it is empty."""
        self._drop_stale()
        while self._heap and self._heap[0][2].state is not SequenceState.WAITING:
            self._pop_entry()
            self._num_stale -= 1
        return self._heap[0][2] if self._heap else None

    def in_order(self) -> Iterator[Sequence]:
        """The queue from its head on. Meanwhile it may change only by parking."""
        heap = self._heap
        # Entry i of a heap comes before its children 2i + 1 and 2i + 2.
        frontier = [(heap[0][0], 0)] if heap else []
        while frontier:
            _, index = heapq.heappop(frontier)
            sequence = heap[index][2]
            if sequence.state is SequenceState.WAITING:
                yield sequence
            for child in (2 * index + 1, 2 * index + 2):
                if child < len(heap):
                    heapq.heappush(frontier, (heap[child][0], child))

    def pop(self) -> Sequence:
        """Takes the head out of the queue.

        Raises:
            IndexError: it is empty.
        """
        self.head()
        return self._pop_entry()

    def resume(self, sequence: Sequence) -> None:
        """A preempted sequence wants to run again."""
        if sequence.may_sample(self._stop_lag):
            self._push(sequence)
        else:
            sequence.state = SequenceState.PARKED

    def park(self, sequence: Sequence) -> None:
        """The sequence waits outside the queue until it is woken."""
        sequence.state = SequenceState.PARKED
        self._num_stale += 1

    def wake(self, sequence: Sequence) -> None:
        """Puts a parked sequence back into the queue, if nothing else keeps it from running."""
        if sequence.state is SequenceState.PARKED:
            self.resume(sequence)

    def acknowledged(self, sequence: Sequence, num_tokens: int) -> None:
        """The server has searched ``num_tokens`` of a sequence without a slot."""
        was_behind = not sequence.may_sample(self._stop_lag)
        sequence.num_acked = max(sequence.num_acked, num_tokens)
        if was_behind:
            self.wake(sequence)

    def hold_back(self) -> list[Sequence]:
        """Keeps sequences that have not begun out of the queue, until ``let_go``.

        Returns:
            Those that were in it.
        """
        self._holds_back = True
        held = [sequence for sequence in self.waiting() if not sequence.has_begun]
        for sequence in held:
            self.park(sequence)
            self._held[sequence] = None
        return held

    def let_go(self) -> None:
        """Puts the sequences that were held back into the queue."""
        self._holds_back = False
        held, self._held = self._held, {}
        for sequence in held:
            self.wake(sequence)

    def held(self) -> list[Sequence]:
        """The sequences that are kept out of the queue because they have not begun."""
        return list(self._held)

    def is_shared(self, sequence: Sequence) -> bool:
        """Whether another client has sequences of this one's priority."""
        return self.shares.num_clients(sequence.request.message.priority) > 1

    def num_followers(self, leader: Sequence) -> int:
        """How many sequences would fork from this one when it has fed its prompt."""
        request = leader.request
        if request.leader is not leader or self._holds_back:
            return 0
        return len(request.followers)

    def num_followers_before(self, leader: Sequence, order: int, most: int) -> int:
        """How many of them come before this order, counted up to ``most``."""
        count = min(most, self.num_followers(leader))
        followers = leader.request.followers.values()
        if count and next(iter(followers)).order > order:  # the last one
            first = islice(reversed(followers), count)
            count = sum(1 for _ in takewhile(lambda follower: follower.order < order, first))
        return count

    def next_follower_order(self, leader: Sequence) -> int:
        """The order of its first follower; more than any order where it has none."""
        if self.num_followers(leader) == 0:
            return NO_ORDER
        return next(reversed(leader.request.followers.values())).order

    def pop_followers(self, leader: Sequence, count: int) -> list[Sequence]:
        """Takes out the first ``count`` followers, to run."""
        return [leader.request.followers.popitem()[1] for _ in range(count)]

    def prompt_is_fed(self, leader: Sequence) -> None:
        """Makes the next follower a leader, which feeds the rest that is not in the cache again."""
        if leader.request.leader is leader:
            self._next_leads(leader.request)

    def end(self, sequence: Sequence) -> None:
        """Forgets a sequence, and its request with the last one."""
        request = sequence.request
        if sequence.state is SequenceState.WAITING:
            self._num_stale += 1
        sequence.state = SequenceState.ENDED
        self._drop_stale()
        self.shares.leave(sequence)
        self.num_sequences -= 1
        self._held.pop(sequence, None)
        del request.sequences[sequence.sample_index]
        request.followers.pop(sequence.sample_index, None)
        if request.leader is sequence:
            self._next_leads(request)
        if not request.sequences:
            del self.requests[request.message.request_id]

    def waiting(self) -> list[Sequence]:
        """The queue's sequences, in no particular order."""
        return [entry for _, _, entry in self._heap if entry.state is SequenceState.WAITING]

    def _next_leads(self, request: Request) -> None:
        request.leader = None
        if request.followers:
            _, request.leader = request.followers.popitem()
            self._push(request.leader)

    def _push(self, sequence: Sequence) -> None:
        if self._holds_back and not sequence.has_begun:
            sequence.state = SequenceState.PARKED
            self._held[sequence] = None
            return
        sequence.state = SequenceState.WAITING
        if sequence.has_entry:  # from before it was parked
            self._num_stale -= 1
        else:
            sequence.has_entry = True
            heapq.heappush(self._heap, (sequence.order, sequence.arrival, sequence))

    def _sort(self) -> None:
        """Puts the queue in order after places have changed."""
        self._heap = [(entry.order, entry.arrival, entry) for _, _, entry in self._heap]
        heapq.heapify(self._heap)

    def _pop_entry(self) -> Sequence:
        sequence = heapq.heappop(self._heap)[2]
        sequence.has_entry = False
        return sequence

    def _drop_stale(self) -> None:
        """Removes stale entries where most are stale."""
        if self._num_stale * 2 <= len(self._heap):
            return
        for _, _, sequence in self._heap:
            sequence.has_entry = sequence.state is SequenceState.WAITING
        self._heap = [entry for entry in self._heap if entry[2].has_entry]
        heapq.heapify(self._heap)
        self._num_stale = 0


def _give_tokens(request: Request, progress: Progress) -> list[Sequence]:
    """Stores what samples have generated elsewhere; returns the sequences that have begun."""
    request.num_finished = progress.num_finished
    begun, prompt_ids, start = [], request.prompt_ids, 0
    for sequence, count in zip(
        request.sequences.values(), progress.num_generated.tolist(), strict=True
    ):
        ids = progress.generated_ids[start : start + count]
        start += count
        if count:
            sequence.prompt_ids = np.concatenate([prompt_ids, ids])
            sequence.stored = [GeneratedTokens.without_logprobs(ids)]
            sequence.num_stored = sequence.num_acked = count
            sequence.came_with_tokens = True
            begun.append(sequence)
    return begun
