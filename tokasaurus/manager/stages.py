"""What becomes of requests between their arrival and their first token, for logs and traces.

Each stage is a line of the log, at DEBUG. Requests that ask for it (``report_stages``) also have
theirs reported to the server, which knows the time. Decides nothing.
"""

from __future__ import annotations

import logging

from tokasaurus.manager.sequence import Request, Sequence, SequenceState
from tokasaurus.manager.slots import SlotTable
from tokasaurus.observability.request_names import about
from tokasaurus.protocol.messages import FinishReason, RequestStage, Stage

__all__ = ["Stages"]

log = logging.getLogger(__name__)


class Stages:
    """Notes the stages of requests."""

    def __init__(self) -> None:
        self._messages: list[RequestStage] = []
        # Requests that ask for reports and wait for a first token, with the sample that will bring
        # it: the one that was admitted first.
        self._awaited: dict[Request, Sequence] = {}

    def admitted(self, sequence: Sequence, waited_s: float, num_found: int) -> None:
        """A sequence runs for the first time.

        Args:
            sequence: that runs.
            waited_s: since its request arrived.
            num_found: tokens of its prompt that need no computation.
        """
        request = sequence.request
        if request.message.report_stages and not request.is_announced:
            request.is_announced = True
            self._awaited[request] = sequence
            self._report(request, Stage.ADMITTED)
        _debug(
            request,
            "sample %d runs after %.3f s in the queue: %d of its %d prompt tokens are there",
            sequence.sample_index,
            waited_s,
            num_found,
            len(sequence.prompt_ids),
        )

    def preempted(self, sequence: Sequence) -> None:
        """A sequence gives its pages back, and will go on later."""
        if sequence.request.message.report_stages:
            self._report(sequence.request, Stage.PREEMPTED)
        _debug(sequence.request, "sample %d is preempted", sequence.sample_index)

    def ended(self, sequence: Sequence, reason: FinishReason) -> None:
        """A sequence has ended."""
        _debug(sequence.request, "sample %d ends: %s", sequence.sample_index, reason.name.lower())

    def note_first_tokens(self, slots: SlotTable) -> None:
        """Looks for first tokens among the requests that wait for theirs.

        Call it while sequences that have ended in this turn still have their slots.
        """
        for request, sequence in list(self._awaited.items()):
            if sequence.state is SequenceState.ENDED and not _has_token(sequence, slots):
                # It was ended before; another sample brings the first token.
                others = request.sequences.values()
                sequence = next((each for each in others if each.was_admitted), sequence)
                self._awaited[request] = sequence
            if _has_token(sequence, slots):
                self._report(request, Stage.FIRST_TOKEN)
            elif request.sequences:
                continue
            del self._awaited[request]

    def take(self) -> list[RequestStage]:
        """The reports since the last call."""
        messages, self._messages = self._messages, []
        return messages

    def _report(self, request: Request, stage: Stage) -> None:
        self._messages.append(RequestStage(request.message.request_id, stage))


def _has_token(sequence: Sequence, slots: SlotTable) -> bool:
    return sequence.num_stored > 0 or (sequence.slot >= 0 and bool(slots.known[sequence.slot]))


def _debug(request: Request, text: str, *values: object) -> None:
    if log.isEnabledFor(logging.DEBUG):
        log.debug(text, *values, extra=about(request.message.name))
