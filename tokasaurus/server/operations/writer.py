"""The seam between running a request and the JSON of its answer.

Every protocol has its own writers. An ``Execution`` asks its writer for a whole answer, or for the
events of a stream one by one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from tokasaurus.errors import TokasaurusError
from tokasaurus.server.errors import error_body
from tokasaurus.text.generation import Generation
from tokasaurus.text.samples import SampleOutput

__all__ = ["DONE", "AnswerWriter", "StreamWriter", "event"]

DONE = b"data: [DONE]\n\n"


def event(body: Mapping[str, Any]) -> bytes:
    """One server-sent event, on one line."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


class AnswerWriter(ABC):
    """Writes the answer to one request when its generations have finished.

    Attributes:
        answer_id: the id of the answer; "" if it has none.
    """

    answer_id = ""

    @abstractmethod
    def takes_long(self, generations: Sequence[Generation]) -> bool:
        """Whether ``whole`` may take more than about a millisecond."""

    @abstractmethod
    def whole(self, generations: Sequence[Generation]) -> bytes:
        """The answer, one line of JSON.

        Raises:
            RequestError: the request asks for something that turns out to be impossible only now.
        """


class StreamWriter(AnswerWriter):
    """Writes the answer to one request, whole or as a stream."""

    @abstractmethod
    def chunk(
        self, generations: Sequence[Generation], position: int, output: SampleOutput
    ) -> bytes:
        """The events for the new output of one sample of the generation at ``position``."""

    @abstractmethod
    def end(self, generations: Sequence[Generation]) -> bytes:
        """The events after everything was streamed."""

    def failure(self, error: TokasaurusError) -> bytes:
        """The last event of a stream that breaks off."""
        return event(error_body(error))
