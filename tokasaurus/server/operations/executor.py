"""Carries out operations: from a decoded body to a running request, or to the JSON of its answer.

There are three ways in, over the same path:

- ``execute``, for a route with one request: it has a connection to watch and may stream;
- ``prepare`` and ``start``, for a route with several requests, which run all or none;
- ``answer``, for the lines of batches, which have only a body and want JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import msgspec

from tokasaurus.errors import EngineAborted, EngineError, RequestError
from tokasaurus.protocol.messages import MAX_PRIORITY
from tokasaurus.server.errors import TimeIsUp, error_body, error_status
from tokasaurus.server.operations.execution import Execution
from tokasaurus.server.operations.heavy_work import MANY_CHARACTERS, in_thread_if
from tokasaurus.server.operations.operation import Operation, Task
from tokasaurus.server.operations.request_trace import RequestTrace, begin_trace
from tokasaurus.server.operations.schemas import EngineRequest
from tokasaurus.server.state import Engine, EngineState
from tokasaurus.text.cartridges import FIELD as CARTRIDGES
from tokasaurus.text.cartridges import Lease
from tokasaurus.text.generations import Generations
from tokasaurus.text.params import renamed
from tokasaurus.text.preparation import Preparer

__all__ = ["Executor", "Waiting"]

Waiting: TypeAlias = Callable[[Coroutine[Any, Any, Lease]], Awaitable[Lease]]
"""Waits for a lease, or gives up: then it cancels the wait and raises why."""

log = logging.getLogger(__name__)


class Executor:
    """Carries out operations on one engine.

    Args:
        state: of the engine.
        operations: by path.
    """

    def __init__(self, state: EngineState, operations: Mapping[str, Operation]) -> None:
        self.operations = operations
        self._state = state

    async def execute(
        self,
        operation: Operation,
        body: Any,
        share: Callable[[str | None], str],
        max_priority: int,
        name: str = "",
        waiting: Waiting | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> Execution:
        """Starts a client's request, if the engine has room for it.

        Args:
            operation: the kind of request.
            body: decoded JSON, of any shape.
            share: the client whose share of the engine a request takes, by the user that it names.
            max_priority: by how much the request may outrank the default priority.
            name: of the request, by which it may be aborted.
            waiting: waits for the request's cartridges, and may give up.
            headers: ``traceparent`` and ``tracestate``, if the client's trace goes on here.

        Raises:
            RequestError: the request is wrong; names the field.
            EngineError: the engine cannot serve, or has no room.
        """
        engine = self._state.engine()
        trace = self._begin_trace(operation, body, engine, headers)
        with _ending(trace):
            request = _read(operation, body, max_priority, engine)
            client = share(request.user)
            # Asked before the prompts are tokenized, so that a flood of refusals is cheap.
            engine.generations.check_room(client)
            task = await self._prepared(operation, request, engine, client, waiting)
            task = _traced(task, trace)
        try:
            # Asked again: meanwhile the engine may have died, and other requests may have come.
            table = self._state.engine().generations
            table.check_room(client)
            return _started(task, table, client, name)
        except BaseException:
            task.release()
            raise

    def check_room(self, client: str) -> None:
        """Raises EngineError if no further request of this client may start."""
        self._state.engine().generations.check_room(client)

    async def prepare(self, operation: Operation, body: Any, max_priority: int) -> Task:
        """Reads a request, tokenizes its prompts, and compiles its grammar. Nothing runs yet.

        Args:
            operation: the kind of request.
            body: decoded JSON, of any shape.
            max_priority: by how much the request may outrank the default priority.

        Returns:
            The task. It must be started or released.

        Raises:
            RequestError: the request is wrong; names the field.
            EngineError: the engine cannot serve.
        """
        engine = self._state.engine()
        trace = self._begin_trace(operation, body, engine, {})
        with _ending(trace):
            request = _read(operation, body, max_priority, engine)
            return _traced(await self._prepared(operation, request, engine, ""), trace)

    def start(self, task: Task, client: str | None = None) -> Execution:
        """Sends the prompts to the engine. The task is released with its execution.

        Args:
            task: as prepared.
            client: whose share it takes; None is the engine's own work, which has no time limit.

        Raises:
            EngineError: the engine cannot serve any more.
        """
        try:
            return _started(task, self._state.engine().generations, client)
        except BaseException:
            task.release()
            raise

    async def answer(self, path: str, body: Any, *, priority: int = 0) -> tuple[int, bytes]:
        """What the route would answer to this body. Cancelling it ends what runs for it.

        A command that aborts requests does not end it: it begins again.

        Args:
            path: of an operation.
            body: decoded JSON, of any shape.
            priority: added to the request's own.

        Returns:
            The status code and the JSON. An error of the request is an answer, too.

        Raises:
            EngineError: the engine did not answer, and another engine may.
        """
        try:
            operation = self.operations.get(path)
            if operation is None:
                raise RequestError(
                    f"url must be one of {', '.join(self.operations)}, not {path!r}", "url"
                )
            while True:
                limit = self._state.engine().preparer.config.max_request_priority
                task = await self.prepare(operation, body, limit)
                if task.stream is not None:
                    task.release()
                    raise RequestError(
                        "stream must be false: there is no connection to stream to", "stream"
                    )
                with self.start(_with_priority(task, priority)) as execution:
                    content = await _unless_aborted(execution)
                if content is not None:
                    return 200, content
        except EngineError:
            raise
        except Exception as error:
            if (status := error_status(error)) >= 500:
                log.exception("a request to %s failed", path)
            return status, msgspec.json.encode(error_body(error))

    def _begin_trace(
        self, operation: Operation, body: Any, engine: Engine, headers: Mapping[str, str]
    ) -> RequestTrace | None:
        model = engine.preparer.config.model_name
        return begin_trace(self._state.tracing, operation.kind, body, model, headers)

    async def _prepared(
        self,
        operation: Operation,
        request: EngineRequest,
        engine: Engine,
        client: str,
        waiting: Waiting | None = None,
    ) -> Task:
        """The task behind its cartridges. Raises RequestError, or EngineError."""
        if not request.cartridge_specs:
            return await _task(operation, request, engine.preparer)
        acquiring = self._lease(request, engine)
        with engine.generations.expecting(client):
            lease = await (acquiring if waiting is None else waiting(acquiring))
        try:
            task = await _task(operation, request, engine.preparer.behind(lease.prefix))
        except BaseException:
            lease.release()
            raise
        return dataclasses.replace(task, lease=lease)

    async def _lease(self, request: EngineRequest, engine: Engine) -> Lease:
        if engine.prefixes is None:
            raise RequestError("this engine has no cartridges", CARTRIDGES)
        limit_s = engine.preparer.config.request_timeout_s
        acquiring = asyncio.ensure_future(engine.prefixes.acquire(request.cartridge_specs))
        with self._state.waiting(acquiring):
            try:
                return await asyncio.wait_for(acquiring, limit_s)
            except asyncio.TimeoutError:
                raise TimeIsUp(limit_s or 0.0) from None


@contextlib.contextmanager
def _ending(trace: RequestTrace | None) -> Iterator[None]:
    """Ends a trace with the error that the block raises."""
    try:
        yield
    except BaseException as error:
        if trace is not None:
            trace.end(error=error)
        raise


def _traced(task: Task, trace: RequestTrace | None) -> Task:
    return task if trace is None else dataclasses.replace(task, trace=trace)


def _read(operation: Operation, body: Any, max_priority: int, engine: Engine) -> EngineRequest:
    request = operation.read(body).within(max_priority)
    return request.with_tags_read() if engine.preparer.config.cartridge_tags else request


async def _task(operation: Operation, request: EngineRequest, preparer: Preparer) -> Task:
    """Raises RequestError, in the words of the request."""
    heavy = (
        request.needs_grammar
        or operation.num_characters(request) > MANY_CHARACTERS
        or preparer.tokenizer.chats_take_long
    )
    try:
        return await in_thread_if(heavy, lambda: operation.prepare(request, preparer))
    except RequestError as error:
        raise renamed(error, request.field_names()) from None


def _started(task: Task, table: Generations, client: str | None, name: str = "") -> Execution:
    if client is None:
        return Execution(task, table)
    limit_s = table.config.request_timeout_s
    return Execution(task, table, client=client, name=name, timeout_s=limit_s)


async def _unless_aborted(execution: Execution) -> bytes | None:
    """The answer; None if a command aborted it."""
    try:
        content = await execution.answer()
    except EngineAborted:
        return None
    return None if execution.was_aborted else content


def _with_priority(task: Task, priority: int) -> Task:
    if priority == 0:
        return task
    prompts = []
    for prompt in task.prompts:
        sum_ = max(-MAX_PRIORITY, min(prompt.params.priority + priority, MAX_PRIORITY))
        params = dataclasses.replace(prompt.params, priority=sum_)
        prompts.append(dataclasses.replace(prompt, params=params))
    return dataclasses.replace(task, prompts=prompts)
