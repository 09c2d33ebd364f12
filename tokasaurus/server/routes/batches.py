"""``/v1/batches``, as OpenAI's clients use it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from tokasaurus.batch.lines import window_seconds
from tokasaurus.batch.records import Batch, new_id
from tokasaurus.batch.runner import BatchRunner
from tokasaurus.batch.store import DirectoryInUse, JobStore
from tokasaurus.config.slices import ServerConfig
from tokasaurus.errors import ConfigError, NotFound, RequestError
from tokasaurus.server.http.answers import json_answer
from tokasaurus.server.http.bodies import read_json
from tokasaurus.server.http.queries import read_query, whole_number
from tokasaurus.server.operations.executor import Executor
from tokasaurus.server.operations.schemas import Metadata, body_reference
from tokasaurus.server.operations.strict import StrictSchema, validated
from tokasaurus.server.protocols.table import OPERATIONS
from tokasaurus.server.routes.files import MAX_LIFETIME_S, json_page
from tokasaurus.server.state import EngineState

__all__ = ["SAMPLES_AHEAD", "BatchRequest", "BatchRoutes", "batch_runner", "open_store"]

_WINDOW = "24h"
_DISK_SHARE = 0.1  # of files, where max_stored_bytes is not set
SAMPLES_AHEAD = 2
"""Samples of batches in flight for each that can run, so that enough wait to fill every gap."""


def open_store(config: ServerConfig) -> JobStore:
    """Opens the store of an engine.

    Raises:
        DirectoryInUse: another process has it.
        ConfigError: it cannot be used.
    """
    try:
        directory = Path(config.data_dir).expanduser()
        return JobStore(directory, config.max_stored_bytes, _DISK_SHARE)
    except (ConfigError, RuntimeError) as error:  # RuntimeError: there is no home directory
        kind = DirectoryInUse if isinstance(error, DirectoryInUse) else ConfigError
        raise kind(f"data_dir: {error}; another can be chosen with data_dir=") from None


def batch_runner(config: ServerConfig, state: EngineState, store: JobStore | None) -> BatchRunner:
    """The batches of an engine; the caller starts and closes them.

    Args:
        config: the server's slice.
        state: of the engine.
        store: None if another engine has it, and the runner adopts it later.
    """
    ahead = SAMPLES_AHEAD * config.max_seqs_per_forward
    return BatchRunner(
        store,
        Executor(state, OPERATIONS).answer,
        urls=list(OPERATIONS),
        model=config.model_name,
        # At most half of the queue, so that batches never keep requests out.
        max_samples=min(ahead, max(1, config.max_queued_requests // 2)),
    )


class OutputExpiresAfter(StrictSchema):
    """How long the output files of a batch are kept."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=1, le=MAX_LIFETIME_S)]


class BatchRequest(StrictSchema):
    """``POST /v1/batches``."""

    input_file_id: str
    endpoint: str
    completion_window: str | None = None
    """A number and s, m, h or d; default 24h. A line that has not run by then gets an error."""
    metadata: Metadata | None = None
    output_expires_after: OutputExpiresAfter | None = None


class BatchRoutes:
    """The routes.

    Args:
        batches: runs the batches.
    """

    def __init__(self, batches: BatchRunner) -> None:
        self._batches = batches

    def router(self) -> APIRouter:
        router = APIRouter()
        add = router.add_api_route
        body = {"requestBody": body_reference(BatchRequest)}
        add("/v1/batches", self.create, methods=["POST"], openapi_extra=body)
        add("/v1/batches", self.list, methods=["GET"])
        add("/v1/batches/{batch_id}", self.retrieve, methods=["GET"])
        add("/v1/batches/{batch_id}/cancel", self.cancel, methods=["POST"])
        return router

    async def create(self, request: Request) -> Response:
        """Begins a batch of the requests in a file."""
        asked = validated(await read_json(request), BatchRequest)
        if asked.endpoint not in self._batches.urls:
            raise RequestError(
                f"endpoint must be one of {', '.join(self._batches.urls)}, not {asked.endpoint!r}",
                "endpoint",
            )
        window = _WINDOW if asked.completion_window is None else asked.completion_window
        window_s = window_seconds(window)
        if window_s is None:
            raise RequestError(
                "completion_window must be a number and s, m, h or d, such as 24h, and at most 30d;"
                f" it was {window!r}",
                "completion_window",
            )
        now = int(time.time())
        await self._check_input(asked.input_file_id, now)
        batch = Batch(
            id=new_id("batch").replace("-", "_"),
            endpoint=asked.endpoint,
            input_file_id=asked.input_file_id,
            completion_window=window,
            created_at=now,
            expires_at=now + window_s,
            metadata=asked.metadata,
            model=self._batches.model,
        )
        lifetime = asked.output_expires_after
        await self._batches.add(batch, lifetime.seconds if lifetime else None)
        return json_answer(batch)

    async def list(self, request: Request) -> Response:
        """Batches, newest first."""
        query = read_query(request, ("limit", "after"))
        batches, more = await self._batches.ask(
            self._batches.store.list_batches,
            after=query.get("after"),
            limit=whole_number(query, "limit", 20, 1, 100),
        )
        return json_answer(json_page(batches, more))

    async def retrieve(self, batch_id: str) -> Response:
        """A batch and its progress."""
        return json_answer(await self._batches.ask(self._batches.store.batch, batch_id))

    async def cancel(self, batch_id: str) -> Response:
        """Ends a batch; answers that it already has are kept."""
        return json_answer(await self._batches.cancel(batch_id))

    async def _check_input(self, file_id: str, now: int) -> None:
        try:
            file = await self._batches.ask(self._batches.store.file, file_id, now)
        except NotFound:
            raise NotFound(f"there is no file {file_id!r}", "input_file_id") from None
        if file.purpose != "batch":
            raise RequestError(
                f"input_file_id must be a file with purpose batch; that of {file_id} is"
                f" {file.purpose}",
                "input_file_id",
            )
