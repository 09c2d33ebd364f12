"""Runs the unfinished batches of a store.

::

    validating ──▶ in_progress ──▶ finalizing ──▶ completed | expired
        │  └───▶ failed  │
        └──▶ cancelling ◀┘ ──▶ cancelled

A status is stored before its work begins, so a new runner continues where the last one ended. The
end of the engine is not an answer: lines without an answer wait for the next engine.

When another engine takes over while this one still works, the runner leaves: lines in flight get
their answers, and everything else waits for the other engine, which gets the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import ParamSpec, TypeVar

from tokasaurus.batch.answering import Answer, Answering
from tokasaurus.batch.capacity import Capacity
from tokasaurus.batch.disk import disk_error
from tokasaurus.batch.lines import parse_line, read_lines
from tokasaurus.batch.records import Batch, BatchError, BatchErrors, StoredFile, new_id
from tokasaurus.batch.results import write_results
from tokasaurus.batch.store import JobStore, NewAnswer
from tokasaurus.batch.validation import Verdict, validate
from tokasaurus.errors import Conflict, EngineError, EngineNotReady

__all__ = ["MAX_LINES", "BatchRunner"]

log = logging.getLogger(__name__)

MAX_LINES = 50_000  # of one batch
_MAX_RUNNING = 16  # batches; the others wait
_MAX_BYTES = 32 << 20  # of requests in flight
_RETRY_S = 30.0  # after the disk failed
_SWEEP_S = 60.0  # between deletions of expired files

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(eq=False)
class _Job:
    """A batch that runs."""

    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    answering: Answering | None = None
    task: asyncio.Task[None] | None = None
    # The results files. The next attempt overwrites what one leaves on a full disk.
    output_id: str = field(default_factory=partial(new_id, "file"))
    error_id: str = field(default_factory=partial(new_id, "file"))


class BatchRunner:
    """Runs the batches of a store. All methods belong to one event loop.

    Args:
        store: the runner is its only user; None if the runner gets it later, with ``adopt``.
        answer: answers one request.
        urls: the urls that requests may have.
        model: the name of the model that answers.
        max_samples: how many samples may be in flight, over all batches.
        max_lines: how many lines a batch may have.
        joins_errors: write errors among the answers, into one file.
    """

    def __init__(
        self,
        store: JobStore | None,
        answer: Answer,
        *,
        urls: Collection[str],
        model: str,
        max_samples: int,
        max_lines: int = MAX_LINES,
        joins_errors: bool = False,
    ) -> None:
        self._store = store
        self.urls = urls
        self.model = model
        self._answer = answer
        self._max_lines = max_lines
        self._joins_errors = joins_errors
        self._capacity = Capacity(max_samples, _MAX_BYTES)
        self._may_run = asyncio.Semaphore(_MAX_RUNNING)
        self._disk = ThreadPoolExecutor(1, "batch-store")
        self._jobs: dict[str, _Job] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._runs = False
        self._leaving = asyncio.Event()

    @property
    def store(self) -> JobStore:
        """The store. Raises EngineNotReady while another engine has it."""
        if self._store is None:
            raise EngineNotReady("another engine has the files and batches; try again in a moment")
        return self._store

    def adopt(self, store: JobStore) -> None:
        """Takes the store of an engine that has left it."""
        self._store = store

    async def on_disk(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls a method of the store in the store's thread."""
        call = partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._disk, call)

    # --- from its owner ---------------------------------------------------------------------------

    async def start(self) -> None:
        """Continues every unfinished batch, and runs new ones from now on. The engine is ready."""
        self._runs = True
        for batch_id in await self.on_disk(self.store.unfinished_batches):
            self._launch(batch_id)
        self._sweeper = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        """Stops all batches. Lines without an answer wait for the next start."""
        self._runs = False
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        if self._sweeper is not None:
            tasks.append(self._sweeper)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def leave(self) -> None:
        """Stops when the lines in flight are answered. The others wait for the next start."""
        self._runs = False
        self._leaving.set()
        for job in self._jobs.values():
            if job.answering is not None:
                job.answering.finish()
        if self._sweeper is not None:
            self._sweeper.cancel()
        while self._jobs:
            await asyncio.wait([job.task for job in self._jobs.values() if job.task is not None])

    async def give_up_store(self) -> None:
        """Closes the store, after ``leave`` or ``stop``."""
        if self._store is not None:
            store, self._store = self._store, None
            await self.on_disk(store.close)

    async def close(self) -> None:
        """Stops, and closes the store."""
        await self.stop()
        await self.give_up_store()
        self._disk.shutdown()

    @property
    def num_lines_in_flight(self) -> int:
        """The lines in flight, over all batches."""
        return self._capacity.num_lines

    async def wait(self, batch_id: str) -> None:
        """Returns when a batch does not run any more: it is finished, or the engine is gone."""
        job = self._jobs.get(batch_id)
        if job is not None and job.task is not None:
            await asyncio.wait({job.task})

    # --- from clients -----------------------------------------------------------------------------

    async def ask(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Like ``on_disk``, but raises EngineError if the disk fails."""
        try:
            return await self.on_disk(function, *args, **kwargs)
        except (OSError, sqlite3.Error) as error:
            raise disk_error(error) from None

    async def add(self, batch: Batch, output_lifetime_s: int | None = None) -> None:
        """Stores a new batch, and runs it. Raises EngineError."""
        await self.ask(self.store.add_batch, batch, output_lifetime_s)
        if self._runs:
            self._launch(batch.id)

    async def cancel(self, batch_id: str) -> Batch:
        """Ends a batch early. Raises NotFound, EngineError, or Conflict if it has already ended."""
        batch = await self.ask(self._mark_cancelling, batch_id)
        if batch_id in self._jobs:
            self._jobs[batch_id].cancelled.set()
        return batch

    def _mark_cancelling(self, batch_id: str) -> Batch:
        batch = self.store.batch(batch_id)
        if batch.status in ("validating", "in_progress"):
            now = int(time.time())
            return self.store.change(batch_id, status="cancelling", cancelling_at=now)
        if batch.status != "cancelling":
            raise Conflict(f"{batch_id} cannot be cancelled: it is {batch.status}", "batch_id")
        return batch

    # --- one batch --------------------------------------------------------------------------------

    def _launch(self, batch_id: str) -> None:
        if batch_id not in self._jobs:
            job = self._jobs[batch_id] = _Job()
            job.task = asyncio.create_task(self._supervise(batch_id, job))

    async def _supervise(self, batch_id: str, job: _Job) -> None:
        try:
            async with self._may_run:
                while not await self._try(batch_id, job):
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(self._leaving.wait(), _RETRY_S)
        except EngineError as error:
            log.warning("%s waits for the next start: %s", batch_id, error)
        except Exception:
            log.exception("%s waits for the next start, because of this:", batch_id)
        finally:
            del self._jobs[batch_id]

    async def _try(self, batch_id: str, job: _Job) -> bool:
        """Runs a batch; returns False if the disk failed, which may work later."""
        if self._leaving.is_set():
            return True
        try:
            await self._carry_out(batch_id, job)
        except (OSError, sqlite3.Error):
            log.exception("%s is tried again in %g s, because of this:", batch_id, _RETRY_S)
            return False
        return True

    async def _carry_out(self, batch_id: str, job: _Job) -> None:
        batch = await self.on_disk(self.store.batch, batch_id)
        if not self.store.path(batch.input_file_id).exists():
            error = BatchErrors((BatchError("missing_file", "the input file is gone"),))
            change = {"status": "failed", "failed_at": int(time.time()), "errors": error}
            batch = await self.on_disk(self.store.change, batch_id, **change)
        if not batch.final and batch.model not in (None, self.model):
            log.warning(
                "%s was begun with %s and continues with %s", batch_id, batch.model, self.model
            )
        if batch.status == "validating":
            batch = await self._validate(batch, job)
        if batch.status == "in_progress" and not self._leaving.is_set():
            await self._answer_in_time(batch, job)
            if self._leaving.is_set():
                return
            batch = await self.on_disk(self._mark_finalizing, batch_id)
        if not batch.final:
            if self._leaving.is_set():
                return
            batch = await self._finalize(batch, job)
        counts = batch.request_counts
        log.info(
            "%s is %s: %d of %d lines answered, %d failed",
            *(batch_id, batch.status, counts.completed, counts.total, counts.failed),
        )

    async def _validate(self, batch: Batch, job: _Job) -> Batch:
        path = self.store.path(batch.input_file_id)
        verdict = await asyncio.to_thread(
            validate, path, batch.endpoint, self.urls, self._max_lines, job.cancelled.is_set
        )
        return await self.on_disk(self._begin, batch.id, verdict)

    def _begin(self, batch_id: str, verdict: Verdict) -> Batch:
        store, now = self.store, int(time.time())
        batch = store.batch(batch_id)
        if batch.status != "validating":
            return batch  # it was cancelled
        if verdict.errors is not None:
            return store.change(batch_id, status="failed", failed_at=now, errors=verdict.errors)
        store.forget_answers(batch_id)
        store.change(batch_id, request_counts=verdict.counts)
        return store.record(batch_id, verdict.bad, status="in_progress", in_progress_at=now)

    async def _answer_in_time(self, batch: Batch, job: _Job) -> None:
        """Answers lines until all are answered, the batch is cancelled, or it expires."""
        left_s = None if batch.expires_at is None else max(0.0, batch.expires_at - time.time())
        path = self.store.path(batch.input_file_id)
        answered = await self.on_disk(self.store.answered_lines, batch.id)

        async def write(answers: list[NewAnswer]) -> None:
            await self.on_disk(self.store.record, batch.id, answers)

        unanswered = (
            parse_line(number, line, batch.endpoint, self.urls)
            for number, line in read_lines(path)
            if number not in answered
        )
        answering = job.answering = Answering(self._answer, self._capacity, write, batch.id)
        if self._leaving.is_set():
            answering.finish()
        work = asyncio.create_task(answering.run(unanswered))
        cancelled = asyncio.create_task(job.cancelled.wait())
        try:
            await asyncio.wait({work, cancelled}, timeout=left_s, return_when="FIRST_COMPLETED")
        finally:
            cancelled.cancel()
            work.cancel()
            await asyncio.wait({work})
        if not work.cancelled():
            work.result()  # raises the error that ended it

    def _mark_finalizing(self, batch_id: str) -> Batch:
        if self.store.batch(batch_id).status == "cancelling":
            return self.store.batch(batch_id)
        return self.store.change(batch_id, status="finalizing", finalizing_at=int(time.time()))

    async def _finalize(self, batch: Batch, job: _Job) -> Batch:
        store = self.store
        cancelled = batch.status == "cancelling"
        answered = await self.on_disk(store.answered_lines, batch.id)
        output_id = job.output_id
        error_id = output_id if self._joins_errors else job.error_id
        counts = await asyncio.to_thread(
            write_results,
            store.path(batch.input_file_id),
            store.answers_path(batch.id),
            answered,
            store.path(output_id),
            store.path(error_id),
            _CANCELLED if cancelled else _EXPIRED,
            self._max_lines,
        )
        now = int(time.time())
        names = {output_id: f"{batch.id}_output.jsonl"}
        names.setdefault(error_id, f"{batch.id}_error.jsonl")
        files = {file_id: self._result_file(file_id, name, now) for file_id, name in names.items()}
        expired = not cancelled and counts.total > len(answered)
        status = "cancelled" if cancelled else "expired" if expired else "completed"
        return await self.on_disk(
            store.finish,
            batch.id,
            [file for file in files.values() if file is not None],
            **{"status": status, f"{status}_at": now},
            request_counts=counts,
            output_file_id=output_id if files[output_id] else None,
            error_file_id=error_id if files[error_id] else None,
        )

    def _result_file(self, file_id: str, name: str, now: int) -> StoredFile | None:
        """The record of a results file; an empty file is deleted instead."""
        path = self.store.path(file_id)
        if size := path.stat().st_size:
            return StoredFile(
                id=file_id, bytes=size, created_at=now, filename=name, purpose="batch_output"
            )
        path.unlink()
        return None

    async def _sweep(self) -> None:
        while True:
            with contextlib.suppress(OSError, sqlite3.Error):
                await self.on_disk(self.store.drop_expired_files, time.time())
            await asyncio.sleep(_SWEEP_S)


_CANCELLED = ("batch_cancelled", "the batch was cancelled before this line was answered")
_EXPIRED = ("batch_expired", "the batch expired before this line was answered")
