"""Batches that were sent to the worker, until their results come back.

Knows which slots may leave after which batch, so that a slot is reused only after the last batch
that has a row for it. Does not know why they leave.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from tokasaurus.errors import ProtocolError
from tokasaurus.manager.sequence import Sequence
from tokasaurus.manager.slots import IndexArray
from tokasaurus.protocol.messages import ForwardResult

__all__ = ["Flight", "InFlight", "PromptPiece"]


@dataclass(frozen=True, eq=False, slots=True)
class PromptPiece:
    """A chunk of a prompt; its prompt logprobs will come with a result."""

    sequence: Sequence
    first_position: int  # in the request's prompt, of the token that the first logprob is about
    num_tokens: int
    num_logprobs: int
    ends_prompt: bool


@dataclass(frozen=True, eq=False, slots=True)
class Flight:
    """What is remembered of a batch until its result is absorbed."""

    number: int
    sampling_slots: IndexArray  # in the order of the result's rows
    prompt_pieces: list[PromptPiece]  # in the order of the result's prompt rows
    pooled: list[Sequence]  # their prompts end in it; in the order of the result's pooled states
    departures: list[int] = field(default_factory=list)  # slots without a row in any later batch


class InFlight:
    """The batches in flight, oldest first."""

    def __init__(self) -> None:
        self.next_number = 0  # of the batch that is sent next
        self._flights: deque[Flight] = deque()

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def flights(self) -> tuple[Flight, ...]:
        """All of them, oldest first."""
        return tuple(self._flights)

    def add(self, flight: Flight) -> None:
        """A batch was sent."""
        self._flights.append(flight)
        self.next_number += 1

    def land(self, result: ForwardResult) -> Flight:
        """A result came back.

        Raises:
            ProtocolError: it is not that of the oldest batch, or has another number of rows.
        """
        if not self._flights or result.number != self._oldest:
            expected = self._oldest if self._flights else "none"
            raise ProtocolError(f"result of batch {result.number} where {expected} was expected")
        flight = self._flights.popleft()
        if len(result.token_ids) != len(flight.sampling_slots):
            raise ProtocolError(
                f"batch {result.number} samples {len(flight.sampling_slots)} rows,"
                f" its result has {len(result.token_ids)}"
            )
        return flight

    def names(self, last_batch: int) -> bool:
        """Whether the batch with that number is still in flight."""
        return last_batch >= self._oldest

    def depart_after(self, last_batch: int, slot: int) -> None:
        """Remembers to free a slot when this batch, which is in flight, has landed."""
        self._flights[last_batch - self._oldest].departures.append(slot)

    @property
    def _oldest(self) -> int:
        """The number of the oldest batch in flight."""
        return self.next_number - len(self._flights)
