"""The backlog: requests that live, and their sequences that do not run.

Owns the request table, the queue, and the two reasons to be parked outside it:

- a *follower* waits until its request's *leader* has computed the prompt they share, then finds it in
  the prefix cache;
- a preempted sequence whose server is behind with acknowledging must not sample yet.

The queue is in order of arrival. Preempted sequences arrived before everything that was never admitted,
so they come first by themselves. Knows nothing of slots and pages.
"""

from __future__ import annotations

import heapq

from tokasaurus.manager.sequence import Request, Sequence, SequenceState
from tokasaurus.protocol.messages import GenerateRequest

__all__ = ["Backlog"]


class Backlog:
    """Requests by id, and the queue of their waiting sequences.

    Args:
        page_size: prompts that fill no page have nothing to share.
        stop_lag: tokens that may be planned beyond what the server acknowledged.
    """

    def __init__(self, page_size: int, stop_lag: int) -> None:
        self.requests: dict[int, Request] = {}
        self.num_sequences = 0  # of all requests that have not ended
        self._page_size = page_size
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
        shares_prompt = message.n > 1 and len(message.prompt_ids) > self._page_size
        for sample_index in range(message.n):
            sequence = Sequence(
                request=request,
                sample_index=sample_index,
                order=self._num_arrived,
                prompt_ids=message.prompt_ids,
                state=SequenceState.PARKED,
                prompt_logprobs_due=sample_index == 0 and message.num_prompt_logprobs >= 0,
            )
            self._num_arrived += 1
            request.sequences[sample_index] = sequence
            if not shares_prompt:
                self._push(sequence)
            elif sample_index == 0:
                request.leader = sequence
                self._push(sequence)
            else:
                request.followers[sample_index] = sequence
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

    def acknowledged(self, sequence: Sequence, num_tokens: int) -> None:
        """The server has searched so many tokens of a sequence without a slot."""
        sequence.num_acked = max(sequence.num_acked, num_tokens)
        is_follower = sequence.sample_index in sequence.request.followers
        if sequence.state is SequenceState.PARKED and not is_follower:
            self.resume(sequence)

    def prompt_is_findable(self, sequence: Sequence) -> None:
        """The sequence's prompt is in the prefix cache: followers need wait no longer."""
        request = sequence.request
        if request.leader is sequence:
            request.leader = None
            for follower in request.followers.values():
                self._push(follower)
            request.followers.clear()

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
        request.followers.pop(sequence.sample_index, None)
        if request.leader is sequence:
            self._take_over(request)
        if not request.sequences:
            del self.requests[request.message.request_id]

    def waiting(self) -> list[Sequence]:
        """The queue's sequences, in no particular order."""
        return [entry for _, entry in self._heap if entry.state is SequenceState.WAITING]

    def _take_over(self, request: Request) -> None:
        """The leader is gone before its prompt was computed: the next follower leads."""
        request.leader = None
        if request.followers:
            sample_index = min(request.followers)
            request.leader = request.followers.pop(sample_index)
            self._push(request.leader)

    def _push(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.WAITING
        heapq.heappush(self._heap, (sequence.order, sequence))

    def _drop_stale(self) -> None:
        self._heap = [entry for entry in self._heap if entry[1].state is SequenceState.WAITING]
        heapq.heapify(self._heap)
        self._num_stale = 0
