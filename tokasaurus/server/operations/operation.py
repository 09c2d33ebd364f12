"""One kind of request, and one request that can run.

An operation turns a request into prompts that can run and a writer of their answer. It knows nothing of
where the request came from, an HTTP connection or a line of a batch: ``Answers`` carries it out for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokasaurus.errors import RequestError
from tokasaurus.server.operations.schemas import EngineRequest, parse
from tokasaurus.server.operations.writer import AnswerWriter
from tokasaurus.text.preparation import PreparedRequest, Preparer

__all__ = ["Operation", "Task"]


@dataclass(frozen=True, eq=False)
class Task:
    """A request that can run: a prompt each, and who writes the answer."""

    body: EngineRequest
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
        alternatives: other shapes of its JSON, told apart by their ``key_fields``.
    """

    path: str
    schema: type[EngineRequest]
    num_characters: Callable[[Any], float]
    prepare: Callable[[Any, Preparer], Task]
    alternatives: tuple[type[EngineRequest], ...] = ()

    @property
    def schemas(self) -> tuple[type[EngineRequest], ...]:
        """Every shape of its JSON."""
        return self.schema, *self.alternatives

    def read(self, body: Any) -> EngineRequest:
        """Checks a decoded JSON body.

        Raises:
            RequestError: it is no such request; names the field.
        """
        return parse(body, self._schema_of(body))

    def _schema_of(self, body: Any) -> type[EngineRequest]:
        if not self.alternatives or not isinstance(body, dict):
            return self.schema
        given = [
            (name, schema)
            for schema in self.schemas
            for name in schema.key_fields
            if body.get(name) is not None
        ]
        if len({schema for _, schema in given}) == 1:
            return given[0][1]
        names = [name for schema in self.schemas for name in schema.key_fields]
        said = (
            " and ".join(name for name, _ in given) + " were given" if given else "none was given"
        )
        raise RequestError(f"one of {', '.join(names)} is required: {said}", names[0])

    @property
    def summary(self) -> str:
        """What it does, in one line."""
        return (self.prepare.__doc__ or "").strip()
