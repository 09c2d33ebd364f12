"""What was sent to the worker and has not come back: batches and controls, in one numbered stream.

Knows which slots may leave after which batch, so that a slot is reused only after the last batch
that has a row for it. Does not know why they leave, nor what a control does.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from tokasaurus.errors import ProtocolError
from tokasaurus.manager.sequence import Sequence
from tokasaurus.manager.slots import IndexArray
from tokasaurus.protocol.commands import Control, ControlDone
from tokasaurus.protocol.messages import ForwardResult, FromWorker

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
    begins_step: bool = True
    departures: list[int] = field(default_factory=list)  # slots without a row in any later batch


class InFlight:
    """The batches and controls in flight, oldest first.

    Attributes:
        next_number: of the batch or control that is sent next.
        num_batches: batches in flight.
    """

    def __init__(self) -> None:
        self.next_number = 0
        self.num_batches = 0
        self._sent: deque[Flight | Control] = deque()

    def __len__(self) -> int:
        """Batches and controls."""
        return len(self._sent)

    @property
    def awaited_batch(self) -> int | None:
        """The number of the oldest in flight; None if that is a control, or nothing is."""
        return self._oldest if self._sent and isinstance(self._sent[0], Flight) else None

    @property
    def flights(self) -> tuple[Flight, ...]:
        """All batches, oldest first."""
        return tuple(sent for sent in self._sent if isinstance(sent, Flight))

    @property
    def controls(self) -> tuple[Control, ...]:
        """All controls, oldest first."""
        return tuple(sent for sent in self._sent if isinstance(sent, Control))

    def add(self, flight: Flight) -> None:
        """A batch was sent."""
        self._sent.append(flight)
        self.next_number += 1
        self.num_batches += 1

    def add_control(self, control: Control) -> None:
        """A control was sent."""
        self._sent.append(control)
        self.next_number += 1

    def land(self, result: ForwardResult) -> Flight:
        """A result came back.

        Raises:
            ProtocolError: it is not that of the oldest batch, or has another number of rows.
        """
        flight = self._oldest_sent(result)
        if not isinstance(flight, Flight):
            raise ProtocolError(f"result of batch {result.number}, which is a control")
        if len(result.token_ids) != len(flight.sampling_slots):
            raise ProtocolError(
                f"batch {result.number} samples {len(flight.sampling_slots)} rows,"
                f" its result has {len(result.token_ids)}"
            )
        self._sent.popleft()
        self.num_batches -= 1
        return flight

    def land_control(self, done: ControlDone) -> Control:
        """The worker has carried out a control, or refused it.

        Raises:
            ProtocolError: it is not the oldest of what is in flight.
        """
        control = self._oldest_sent(done)
        if not isinstance(control, Control):
            raise ProtocolError(f"the worker is done with control {done.number}, which is a batch")
        self._sent.popleft()
        return control

    def names(self, number: int) -> bool:
        """Whether the batch or control with that number is still in flight."""
        return number >= self._oldest

    def depart_after(self, last_batch: int, slot: int) -> None:
        """Remembers to free a slot when this batch, which is in flight, has landed."""
        flight = self._sent[last_batch - self._oldest]
        if not isinstance(flight, Flight):
            raise ProtocolError(f"slot {slot} has a row in batch {last_batch}, which is a control")
        flight.departures.append(slot)

    def _oldest_sent(self, answer: FromWorker) -> Flight | Control:
        if not self._sent or answer.number != self._oldest:
            expected = self._oldest if self._sent else "none"
            what = "control" if isinstance(answer, ControlDone) else "batch"
            raise ProtocolError(f"result of {what} {answer.number} where {expected} was expected")
        return self._sent[0]

    @property
    def _oldest(self) -> int:
        """The number of the oldest batch or control in flight."""
        return self.next_number - len(self._sent)
