"""Batches that were sent and whose results have not come back.

Knows which slots each of them names, so that a slot is reused only after the last one; nothing of why.
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
    """A chunk whose prompt logprobs will come with a result."""

    sequence: Sequence
    first_position: int  # of the token that the first of them is about
    num_tokens: int
    num_logprobs: int
    ends_prompt: bool


@dataclass(frozen=True, eq=False, slots=True)
class Flight:
    """What must be remembered of a batch until its result is absorbed."""

    number: int
    sampling_slots: IndexArray  # in the order of the result's rows
    prompt_pieces: list[PromptPiece]  # in the order of the result's prompt rows
    pooled: list[Sequence]  # whose prompts end in it, in the order of the result's pooled states
    departures: list[int] = field(default_factory=list)  # slots that no later batch names


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
            ProtocolError: it is not the oldest batch's, or has another number of rows.
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
        """Whether the batch of that number is still in flight."""
        return last_batch >= self._oldest

    def depart_after(self, last_batch: int, slot: int) -> None:
        """Remembers to let go of a slot when a batch in flight has landed."""
        self._flights[last_batch - self._oldest].departures.append(slot)

    @property
    def _oldest(self) -> int:
        """The number of the oldest batch in flight."""
        return self.next_number - len(self._flights)
