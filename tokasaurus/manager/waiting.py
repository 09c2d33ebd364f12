"""The backlog: requests that live, and their sequences that do not run.

Owns the request table, the queue, and who follows: of a request's samples one is in the queue, the
*leader*; its *followers* fork from it when it has fed the prompt they share. Outside the queue are also a
preempted sequence whose server is behind with acknowledging, and who waits for pages that another
request's prompt is computing.

The queue is in order of priority, and of arrival within one. Preempted sequences arrived before everything
of their priority that was never admitted, so they come first by themselves. Knows nothing of slots and
pages.
"""

from __future__ import annotations

import heapq

from tokasaurus.manager.sequence import Request, Sequence, SequenceState
from tokasaurus.protocol.messages import GenerateRequest

__all__ = ["MAX_PRIORITY", "Backlog"]

MAX_PRIORITY = 1_000_000  # and as far below 0

_ARRIVALS_OF_A_PRIORITY = 1 << 40


class Backlog:
    """Requests by id, and the queue of their waiting sequences.

    Args:
        stop_lag: tokens that may be planned beyond what the server acknowledged.
    """

    def __init__(self, stop_lag: int) -> None:
        self.requests: dict[int, Request] = {}
        self.num_sequences = 0  # of all requests that have not ended
        self._stop_lag = stop_lag
        self._num_arrived = 0
        # (order, sequence); entries of sequences that ended in the queue stay until they surface.
        self._heap: list[tuple[int, Sequence]] = []
        self._num_stale = 0

    def __len__(self) -> int:
        """Sequences in the queue."""
        return len(self._heap) - self._num_stale

    def add(self, message: GenerateRequest, now: float) -> None:
        """Takes in a request that can run."""
        request = Request(message, now)
        self.requests[message.request_id] = request
        first = (MAX_PRIORITY + message.priority) * _ARRIVALS_OF_A_PRIORITY + self._num_arrived
        sequences = [
            Sequence(
                request=request,
                sample_index=sample_index,
                order=first + sample_index,
                prompt_ids=message.prompt_ids,
                state=SequenceState.FOLLOWING,
                prompt_logprobs_due=sample_index == 0 and message.num_prompt_logprobs >= 0,
            )
            for sample_index in range(message.n)
        ]
        request.sequences.update(enumerate(sequences))
        request.followers.extend(sequences)
        self._next_leads(request)
        self._num_arrived += message.n
        self.num_sequences += message.n

    def find(self, request_id: int, sample_index: int) -> Sequence | None:
        """The sequence of that name, unless it has ended or never was."""
        request = self.requests.get(request_id)
        return request.sequences.get(sample_index) if request else None

    def head(self) -> Sequence | None:
        """The sequence whose turn it is."""
        while self._heap and self._heap[0][1].state is not SequenceState.WAITING:
            heapq.heappop(self._heap)
            self._num_stale -= 1
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Sequence:
        """Takes the head out of the queue."""
        return heapq.heappop(self._heap)[1]

    def resume(self, sequence: Sequence) -> None:
        """A preempted sequence wants to run again."""
        if sequence.may_sample(self._stop_lag):
            self._push(sequence)
        else:
            sequence.state = SequenceState.PARKED

    def park(self, sequence: Sequence) -> None:
        """The sequence, just popped, waits outside the queue until it is woken."""
        sequence.state = SequenceState.PARKED

    def wake(self, sequence: Sequence) -> None:
        """The reason to wait may be gone."""
        if sequence.state is SequenceState.PARKED:
            self.resume(sequence)

    def acknowledged(self, sequence: Sequence, num_tokens: int) -> None:
        """The server has searched so many tokens of a sequence without a slot."""
        was_behind = not sequence.may_sample(self._stop_lag)
        sequence.num_acked = max(sequence.num_acked, num_tokens)
        if was_behind:
            self.wake(sequence)

    def next_follower(self, leader: Sequence) -> Sequence | None:
        """Who would fork from this sequence next, when it has fed its prompt."""
        request = leader.request
        if request.leader is not leader:
            return None
        followers = request.followers
        while followers and followers[0].state is SequenceState.ENDED:
            followers.popleft()
        return followers[0] if followers else None

    def pop_follower(self, leader: Sequence) -> Sequence:
        """Takes that sequence out of the followers, to run."""
        return leader.request.followers.popleft()

    def prompt_is_fed(self, leader: Sequence) -> None:
        """Those who could not run as forks will feed what is not in the prefix cache once more."""
        if leader.request.leader is leader:
            self._next_leads(leader.request)

    def end(self, sequence: Sequence) -> None:
        """Forgets a sequence, and its request with the last one."""
        request = sequence.request
        if sequence.state is SequenceState.WAITING:
            self._num_stale += 1
        sequence.state = SequenceState.ENDED
        if self._num_stale * 2 > len(self._heap):
            self._drop_stale()
        self.num_sequences -= 1
        del request.sequences[sequence.sample_index]
        if request.leader is sequence:
            self._next_leads(request)
        if not request.sequences:
            del self.requests[request.message.request_id]

    def waiting(self) -> list[Sequence]:
        """The queue's sequences, in no particular order."""
        return [entry for _, entry in self._heap if entry.state is SequenceState.WAITING]

    def _next_leads(self, request: Request) -> None:
        request.leader = None
        followers = request.followers
        while followers and request.leader is None:
            follower = followers.popleft()
            if follower.state is not SequenceState.ENDED:
                request.leader = follower
                self._push(follower)

    def _push(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.WAITING
        heapq.heappush(self._heap, (sequence.order, sequence))

    def _drop_stale(self) -> None:
        self._heap = [entry for entry in self._heap if entry[1].state is SequenceState.WAITING]
        heapq.heapify(self._heap)
        self._num_stale = 0
