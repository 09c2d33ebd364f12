"""A kind of request, and one request that is ready to run.

An operation turns a request into prompts that can run and a writer of the answer. It does not know
where the request came from: the ``Executor`` carries it out for HTTP and for lines of batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokasaurus.errors import RequestError
from tokasaurus.server.operations.request_trace import RequestTrace
from tokasaurus.server.operations.schemas import EngineRequest, parse
from tokasaurus.server.operations.writer import AnswerWriter, StreamWriter
from tokasaurus.text.cartridges import Lease
from tokasaurus.text.preparation import PreparedRequest, Preparer

__all__ = ["Operation", "Task"]


@dataclass(frozen=True, eq=False)
class Task:
    """A request that is ready to run.

    Attributes:
        request: what the client asked.
        prompts: one or several, each with its own generation.
        writer: writes the answer.
        stream: the same writer, if the client asked for a stream.
        names: the client's names for the prompts, one for each; empty if it gave none.
        lease: of the cartridges before the prompts; None if there are none. It is released when
            the task has run, or will not.
        trace: of the request; None if it has none.
    """

    request: EngineRequest
    prompts: Sequence[PreparedRequest]
    writer: AnswerWriter
    stream: StreamWriter | None = None
    names: Sequence[str] = ()
    lease: Lease | None = None
    trace: RequestTrace | None = None

    def release(self) -> None:
        """The task has run, or will not. Harmless if called again."""
        if self.lease is not None:
            self.lease.release()
        if self.trace is not None:
            self.trace.end()


@dataclass(frozen=True)
class Operation:
    """A kind of request.

    Args:
        path: of its route; the lines of a batch name it too.
        kind: what OpenTelemetry's conventions call it.
        schema: of its JSON.
        num_characters: about how many characters a request brings to tokenize. A request with many
            is prepared in a thread.
        prepare: makes a task of a request; may take a while. Raises RequestError, with the fields
            as ``SamplingParams`` and the text core call them.
        alternatives: other shapes of its JSON, told apart by their ``key_fields``.
    """

    path: str
    kind: Literal["chat", "text_completion", "embeddings"]
    schema: type[EngineRequest]
    num_characters: Callable[[Any], float]
    prepare: Callable[[Any, Preparer], Task]
    alternatives: tuple[type[EngineRequest], ...] = ()

    @property
    def schemas(self) -> tuple[type[EngineRequest], ...]:
        """Every shape of its JSON."""
        return self.schema, *self.alternatives

    @property
    def summary(self) -> str:
        """What it does, in one line."""
        return (self.prepare.__doc__ or "").strip()

    def read(self, body: Any) -> EngineRequest:
        """Checks a decoded JSON body.

        Raises:
            RequestError: it is not a request of this kind; names the field.
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
