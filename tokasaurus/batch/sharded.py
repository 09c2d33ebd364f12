"""Batches without a server, from the files of a directory to files of another.

::

    OUT/_toka-batch/    a JobStore with a batch for each file; its records stay
    OUT/sub/a.jsonl     the output of IN/sub/a.jsonl: it appears whole
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tokasaurus.batch.offline import (
    JobProgress,
    fingerprint_of,
    publish_output,
    record_file,
    shown_errors,
)
from tokasaurus.batch.records import Batch, BatchError, BatchErrors, RequestCounts, Usage, new_id
from tokasaurus.batch.runner import BatchRunner
from tokasaurus.batch.shards import Part, Shard, find_shards
from tokasaurus.batch.store import JobStore
from tokasaurus.batch.tables import import_requests, is_parquet, load_pyarrow
from tokasaurus.errors import ConfigError

__all__ = ["ShardedJob"]

_AT_ONCE = 16  # shards, so that small ones fill an engine, too
_SHARD = "shard"  # in a batch's metadata: the name


class ShardedJob:
    """A job of several files, or the rest of one that was stopped.

    Each has an output of its own, which appears when it is complete. Files that were answered by an
    earlier run, and have not changed since, are not answered again.

    Args:
        source: a directory or a pattern; see ``find_shards``.
        target: the directory of the answers.
        model: the name of the model that answers.
        part: the shards of this job; None takes all.

    Raises:
        ConfigError: one of these:

            - there are no requests;
            - the target is a file, or cannot be made;
            - an output exists already, and no run has written it;
            - a file or the model has changed since an earlier run;
            - another process works on the same target and part;
            - an output is a Parquet file, and pyarrow is not installed.
    """

    def __init__(self, source: str, target: Path, model: str, part: Part | None = None) -> None:
        self.target = target
        self._model = model
        self.shards = find_shards(source, target, part)
        if not target.parent.is_dir():
            raise ConfigError(f"{target.parent} is not a directory")
        if any(is_parquet(shard.target) for shard in self.shards):
            load_pyarrow()
        if target.exists() and not target.is_dir():
            raise ConfigError(
                f"{target} is a file, and the answers to several files go to a directory; choose"
                " another output"
            )
        try:
            target.mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{target} cannot be made: {error.strerror}") from None
        name = "_toka-batch" if part is None else f"_toka-batch-{part.index}-of-{part.count}"
        self.directory = target / name
        self.store = JobStore(self.directory)
        self._sizes = {shard.name: shard.source.stat().st_size for shard in self.shards}
        self._batch_ids: dict[str, str] = {}  # by name, of shards that were begun
        self._done: set[str] = set()  # that need nothing more
        self._done_sums = _Sums(RequestCounts(), Usage())
        self._elsewhere: set[str] = set()  # whose output another part has written
        self._errors: dict[str, BatchErrors] = {}  # of shards of which no line can run
        try:
            self._todo = deque(self._take_stock(shared=part is not None))
        except BaseException:
            self.store.close()
            raise

    def _take_stock(self, *, shared: bool) -> list[Shard]:
        """Compares the shards with the records of earlier runs; returns those to be answered."""
        before = {(batch.metadata or {}).get(_SHARD): batch for batch in self._batches()}
        todo = []
        for shard in self.shards:
            batch, exists = before.get(shard.name), shard.target.exists()
            if batch is not None and self._starts_over(shard, batch, exists):
                self.store.drop_batch(batch.id)
                batch = None
            if batch is None and exists and shared:
                self._elsewhere.add(shard.name)
            elif exists and (batch is None or not batch.final):
                raise ConfigError(
                    f"{shard.target} exists already; delete it or choose another output"
                )
            elif batch is not None and batch.final and exists:
                if self.store.path(batch.input_file_id).exists():  # that run was killed
                    self._tidy(batch)
                self._end(shard, batch)
            else:
                todo.append(shard)
            if batch is not None:
                self._batch_ids[shard.name] = batch.id
        names = {shard.name for shard in self.shards}
        for name, batch in before.items():
            if name not in names and not batch.final:
                self.store.drop_batch(batch.id)  # its requests are gone
        return todo

    def _starts_over(self, shard: Shard, batch: Batch, exists: bool) -> bool:
        """Whether an earlier run's record of a shard is of no use. Raises ConfigError."""
        if batch.model != self._model:
            raise ConfigError(
                f"{self.target} was begun with model={batch.model}, not {self._model}; continue"
                " with that, or choose another output"
            )
        if batch.final and (batch.errors is not None or not (exists or self._holds_output(batch))):
            return True  # no line could run, or the user has deleted the output
        if batch.metadata == _metadata(shard):
            return False
        if exists:
            raise ConfigError(
                f"{shard.source} has changed since it was answered; delete {shard.target} to have"
                " it answered anew"
            )
        return True

    def _holds_output(self, batch: Batch) -> bool:
        return self.store.path(batch.output_file_id or "none").exists()

    def _batches(self) -> list[Batch]:
        batches: list[Batch] = []
        more = True
        while more:
            after = batches[-1].id if batches else None
            page, more = self.store.list_batches(after=after, limit=1000)
            batches += page
        return batches

    async def run(self, runner: BatchRunner) -> None:
        """Returns when all shards are answered, or the engine is gone."""
        running: set[asyncio.Task[bool]] = set()
        goes_on = True
        try:
            while running or (self._todo and goes_on):
                while self._todo and goes_on and len(running) < _AT_ONCE:
                    shard = self._todo.popleft()
                    running.add(asyncio.create_task(self._answer(shard, runner)))
                ended, running = await asyncio.wait(running, return_when="FIRST_COMPLETED")
                results = [task.result() for task in ended]
                goes_on &= all(results)
        finally:
            for task in running:
                task.cancel()

    async def _answer(self, shard: Shard, runner: BatchRunner) -> bool:
        """Answers a shard; returns False if the engine is gone."""
        batch_id = self._batch_ids.get(shard.name)
        if batch_id is None:
            file_id = new_id("file")
            try:
                metadata = _metadata(shard)
                await asyncio.to_thread(import_requests, shard.source, self.store.path(file_id))
            except (ConfigError, OSError) as error:
                why = str(error)
                if isinstance(error, OSError):
                    if not _is_about(error, shard.source):  # the disk is full, for example
                        raise
                    why = f"it cannot be read: {error.strerror}"
                self._errors[shard.name] = BatchErrors((BatchError("unreadable", why),))
                self._done.add(shard.name)
                return True
            batch = await runner.on_disk(
                record_file, self.store, file_id, shard.source, self._model, metadata
            )
            await runner.add(batch)
            self._batch_ids[shard.name] = batch_id = batch.id
        await runner.wait(batch_id)
        batch = await runner.on_disk(self.store.batch, batch_id)
        if not batch.final:
            return False
        if batch.errors is not None:
            self._errors[shard.name] = batch.errors
        else:
            await asyncio.to_thread(self._publish, shard, batch)
        await runner.on_disk(self._tidy, batch)
        self._end(shard, batch)
        return True

    def _end(self, shard: Shard, batch: Batch) -> None:
        self._done_sums = self._done_sums.with_batch(batch)
        self._done.add(shard.name)

    def _publish(self, shard: Shard, batch: Batch) -> None:
        shard.target.parent.mkdir(parents=True, exist_ok=True)
        publish_output(self.store, batch, shard.target, self.directory)

    def _tidy(self, batch: Batch) -> None:
        """Deletes the files of a batch whose output is published; its record stays."""
        for file_id in (batch.input_file_id, batch.output_file_id):
            if file_id is not None:
                self.store.delete_file(file_id, time.time())

    def progress(self) -> JobProgress:
        """How far it is. Call this in the store's thread."""
        # Copies, since the event loop goes on meanwhile.
        done, sums, begun = set(self._done), self._done_sums, dict(self._batch_ids)
        counted = set(done)
        for name, batch_id in begun.items():
            if name not in done:
                batch = self.store.batch(batch_id)
                sums = sums.with_batch(batch)
                if batch.request_counts.total:  # its lines are counted when its work begins
                    counted.add(name)
        here = [name for name in self._sizes if name not in self._elsewhere]
        whole = sum(self._sizes[name] for name in here)
        share = sum(self._sizes[name] for name in counted) / whole if whole else 1.0
        counts = sums.counts
        if 0 < share < 1:
            counts = msgspec.structs.replace(counts, total=round(counts.total / share))
        num_done = len(done) + len(self._elsewhere)
        return JobProgress(
            "in progress",
            counts,
            sums.usage,
            is_final=num_done == len(self.shards),
            is_estimate=share < 1,
            files=(num_done, len(self.shards)),
        )

    def conclude(self) -> list[str]:
        """Ends the job; says of which files no line could run."""
        self.store.close()
        found = sorted(self._errors.items())
        return [line for name, errors in found for line in shown_errors(errors, f"{name}: ")]


@dataclass(frozen=True)
class _Sums:
    """Over several batches."""

    counts: RequestCounts
    usage: Usage

    def with_batch(self, batch: Batch) -> _Sums:
        ours, more = self.counts, batch.request_counts
        counts = RequestCounts(
            ours.total + more.total, ours.completed + more.completed, ours.failed + more.failed
        )
        return _Sums(counts, self.usage + batch.usage)


def _is_about(error: OSError, path: Path) -> bool:
    """Whether an error is that of a file which is gone, or may not be read."""
    return error.filename is not None and Path(error.filename) == path


def _metadata(shard: Shard) -> dict[str, str]:
    return {_SHARD: shard.name, **fingerprint_of(shard.source)}
