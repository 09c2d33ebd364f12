"""Carries out operations: from a decoded body to a running call, and from there to the bytes of an answer.

One path for all who ask: the HTTP routes, which have a connection to watch and may stream, and those who have
only a body and want the answer as JSON (``answer``: the lines of batches).
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import msgspec

from tokasaurus.errors import EngineError, RequestError
from tokasaurus.protocol.messages import MAX_PRIORITY
from tokasaurus.server.errors import error_body, error_status
from tokasaurus.server.operations.calls import Call, in_thread_if
from tokasaurus.server.operations.operation import Operation, Task
from tokasaurus.server.operations.schemas import EngineRequest
from tokasaurus.server.protocols.table import OPERATIONS
from tokasaurus.server.state import EngineState
from tokasaurus.text.params import renamed

__all__ = ["MANY_CHARACTERS", "Answers"]

log = logging.getLogger(__name__)

MANY_CHARACTERS = (
    4_000  # to tokenize takes longer than about a millisecond, and is done in a thread
)


class Answers:
    """Answers requests on one engine.

    Args:
        state: of the engine.
    """

    def __init__(self, state: EngineState) -> None:
        self._state = state

    def read(self, operation: Operation, body: Any) -> EngineRequest:
        """Checks a request, a decoded JSON body, as far as that takes no time.

        Raises:
            RequestError: it is wrong; names the field.
            EngineError: the engine cannot serve.
        """
        self._state.check()
        return operation.read(body)

    async def prepare(self, operation: Operation, request: EngineRequest) -> Task:
        """Tokenizes a request's prompts, and compiles its grammar. Nothing runs yet.

        Raises:
            RequestError: it is wrong; names the field.
            EngineError: the engine cannot serve.
        """
        preparer = self._state.preparer()
        heavy = request.needs_grammar or operation.num_characters(request) > MANY_CHARACTERS
        try:
            return await in_thread_if(heavy, lambda: operation.prepare(request, preparer))
        except RequestError as error:
            raise renamed(error, request.field_names()) from None

    def check_room(self, client: str) -> None:
        """Whether a request of this client may start. Raises EngineError."""
        self._state.generations().check_room(client)

    def start(self, task: Task, client: str | None = None) -> Call:
        """Sends the prompts to the engine. Raises EngineError.

        Args:
            task: as prepared.
            client: whose it is; None is the engine's own work, which has no time limit.
        """
        # Asked again: the engine may have died while the prompts were tokenized.
        generations = self._state.generations()
        return Call(
            generations,
            task.prompts,
            stream=task.body.streams,
            client=client or "",
            timeout_s=None if client is None else generations.config.request_timeout_s,
        )

    async def finish(self, task: Task, call: Call) -> bytes:
        """Waits for a call without ``stream``, which somebody else ends if this raises; returns its answer.

        Raises:
            RequestError: the engine refuses a prompt.
            EngineDead: the engine died.
            ClientGone, TimeIsUp: as they say.
        """
        try:
            await call.finish()
        except RequestError as error:
            raise renamed(error, task.body.field_names()) from None
        writer, generations = task.writer, call.generations
        return await in_thread_if(writer.takes_long(generations), lambda: writer.whole(generations))

    async def answer(self, path: str, body: Any, *, priority: int = 0) -> tuple[int, bytes]:
        """What the route would answer to this body. If it is cancelled, so is what runs for it.

        Args:
            path: of an operation.
            body: decoded JSON, of any shape.
            priority: added to the request's own.

        Returns:
            The status code and the JSON; an error of the request is an answer, too.

        Raises:
            EngineError: the engine did not answer, and another one may.
        """
        try:
            operation = OPERATIONS.get(path)
            if operation is None:
                raise RequestError(
                    f"url must be one of {', '.join(OPERATIONS)}, not {path!r}", "url"
                )
            task = await self.prepare(operation, self.read(operation, body))
            if task.body.streams:
                raise RequestError(
                    "stream must be false: there is no connection to stream to", "stream"
                )
            with self.start(_with_priority(task, priority)) as call:
                return 200, await self.finish(task, call)
        except EngineError:
            raise
        except Exception as error:
            if (status := error_status(error)) >= 500:
                log.exception("a request to %s failed", path)
            return status, msgspec.json.encode(error_body(error))


def _with_priority(task: Task, priority: int) -> Task:
    if priority == 0:
        return task
    prompts = []
    for prompt in task.prompts:
        sum_ = max(-MAX_PRIORITY, min(prompt.params.priority + priority, MAX_PRIORITY))
        params = dataclasses.replace(prompt.params, priority=sum_)
        prompts.append(dataclasses.replace(prompt, params=params))
    return dataclasses.replace(task, prompts=prompts)
