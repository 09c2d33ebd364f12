"""One kind of request, and one request that can run.

An operation turns a request into prompts that can run and a writer of their answer. It knows nothing of
where the request came from, an HTTP connection or a line of a batch: ``Answers`` carries it out for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokasaurus.server.generation import Generations, PreparedRequest
from tokasaurus.server.schemas import RequestBody
from tokasaurus.server.writer import AnswerWriter

__all__ = ["Operation", "Task"]


@dataclass(frozen=True, eq=False)
class Task:
    """A request that can run: a prompt each, and who writes the answer."""

    body: RequestBody
    prompts: Sequence[PreparedRequest]
    writer: AnswerWriter  # a StreamWriter if the body asks for a stream


@dataclass(frozen=True)
class Operation:
    """One kind of request.

    Args:
        path: of its route; a batch's lines name it too.
        schema: of its JSON.
        num_characters: of a request, to tokenize: many are left to a thread.
        prepare: makes a task of a request; may take a while. Raises RequestError.
    """

    path: str
    schema: type[RequestBody]
    num_characters: Callable[[Any], int]
    prepare: Callable[[Any, Generations], Task]

    @property
    def summary(self) -> str:
        """What it does, in one line."""
        return (self.prepare.__doc__ or "").strip()
