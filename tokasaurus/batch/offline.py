"""A batch without a server, from one file to another.

::

    OUT.toka-batch/    a JobStore with one batch, deleted when OUT is complete
    OUT                the output: it appears whole, when every line has an answer
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from tokasaurus.batch.records import (
    Batch,
    BatchErrors,
    RequestCounts,
    StoredFile,
    Usage,
    new_id,
)
from tokasaurus.batch.runner import BatchRunner
from tokasaurus.batch.store import JobStore
from tokasaurus.batch.tables import import_requests, is_parquet, load_pyarrow, write_parquet
from tokasaurus.errors import ConfigError

__all__ = [
    "JobProgress",
    "OfflineJob",
    "fingerprint_of",
    "publish_output",
    "record_file",
    "shown_errors",
]

_MAX_ERRORS = 10  # shown, of one file


@dataclass(frozen=True)
class JobProgress:
    """How far a job is.

    Attributes:
        status: in a word or two.
        counts: of lines. A total of 0 is not known yet.
        usage: the tokens of all answered lines.
        is_final: everything is answered.
        is_estimate: not all lines have been counted, so that the total is a guess.
        files: how many are done, and how many there are; None for a job of one file.
    """

    status: str
    counts: RequestCounts
    usage: Usage
    is_final: bool
    is_estimate: bool = False
    files: tuple[int, int] | None = None

    @property
    def num_answered(self) -> int:
        return self.counts.completed + self.counts.failed


class OfflineJob:
    """A new job of one file, or the rest of one that was stopped.

    Args:
        source: the file of requests.
        target: the file to write the answers to, in the order of the requests.
        model: the name of the model that answers.

    Raises:
        ConfigError: one of these:

            - the source does not exist, or the target exists already;
            - the source or the model has changed since the job began;
            - another process works on the same target;
            - the target is a Parquet file, and pyarrow is not installed.
    """

    def __init__(self, source: Path, target: Path, model: str) -> None:
        self.target = target
        self._model = model
        self.directory = target.with_name(f"{target.name}.toka-batch")
        if not source.is_file():
            raise ConfigError(f"{source} is not a file")
        if not target.parent.is_dir():
            raise ConfigError(f"{target.parent} is not a directory")
        if target.is_dir():
            raise ConfigError(f"{target} is a directory; name a file in it, for the answers")
        exists_already = ConfigError(f"{target} exists already; delete it or choose another name")
        if target.exists() and not self.directory.exists():
            raise exists_already
        if is_parquet(target):
            load_pyarrow()
        self.store = JobStore(self.directory)
        try:
            self.batch_id = self._unfinished(source) or self._begin(source)
            if target.exists() and not self.batch.final:
                raise exists_already
        except BaseException:
            self.store.close()
            raise

    @property
    def batch(self) -> Batch:
        """The batch as it is now. Call this in the store's thread."""
        return self.store.batch(self.batch_id)

    async def run(self, runner: BatchRunner) -> None:
        """Returns when all lines are answered, or the engine is gone."""
        await runner.wait(self.batch_id)

    def progress(self) -> JobProgress:
        """How far it is. Call this in the store's thread."""
        batch = self.batch
        status = batch.status.replace("_", " ")
        return JobProgress(status, batch.request_counts, batch.usage, batch.final)

    def conclude(self) -> list[str]:
        """Publishes the answers of a finished job, or says why no line could run."""
        errors = self.batch.errors
        if errors is None:
            self.publish()
            return []
        self.drop()
        return shown_errors(errors, "")

    def publish(self) -> None:
        """Moves the output of the finished batch to the target, and deletes everything else."""
        publish_output(self.store, self.batch, self.target, self.directory)
        self.drop()

    def drop(self) -> None:
        """Deletes the job's directory."""
        self.store.close()
        shutil.rmtree(self.directory)

    def _unfinished(self, source: Path) -> str | None:
        batches, _ = self.store.list_batches(after=None, limit=1)
        if not batches:
            return None
        if batches[0].metadata != fingerprint_of(source):
            raise ConfigError(
                f"{source} has changed since {self.target} was begun; delete {self.directory} to"
                " start over"
            )
        if batches[0].model != self._model:
            raise ConfigError(
                f"{self.target} was begun with model={batches[0].model}, not {self._model};"
                f" continue with that, or delete {self.directory} to start over"
            )
        return batches[0].id

    def _begin(self, source: Path) -> str:
        fingerprint = fingerprint_of(source)
        file_id = new_id("file")
        import_requests(source, self.store.path(file_id))
        batch = record_file(self.store, file_id, source, self._model, fingerprint)
        self.store.add_batch(batch)
        return batch.id


def record_file(
    store: JobStore, file_id: str, source: Path, model: str, metadata: dict[str, str]
) -> Batch:
    """Records an imported file; returns a batch of it, which is not recorded yet."""
    now = int(time.time())
    store.add_file(
        StoredFile(
            id=file_id,
            bytes=store.path(file_id).stat().st_size,
            created_at=now,
            filename=source.name,
            purpose="batch",
        )
    )
    return Batch(
        id=new_id("batch"),
        endpoint=None,
        input_file_id=file_id,
        completion_window="",
        created_at=now,
        metadata=metadata,
        model=model,
    )


def publish_output(store: JobStore, batch: Batch, target: Path, directory: Path) -> None:
    """Moves the output of a finished batch to the target, if an earlier run has not.

    Args:
        store: of the batch.
        batch: that is finished.
        target: of its output.
        directory: of the store, on the same file system as the target.
    """
    output = store.path(batch.output_file_id or "none")
    if not output.exists():
        return
    if is_parquet(target):
        table = directory / f"{batch.id}.parquet"
        write_parquet(output, table)
        os.replace(table, target)
        return
    new = directory / f"{batch.id}.new"
    new.touch()
    output.chmod(new.stat().st_mode)  # the store's files are private
    new.unlink()
    os.replace(output, target)


def shown_errors(errors: BatchErrors, where: str) -> list[str]:
    """The first lines about a file of which no line can run."""
    return [
        f"{where}{'' if error.line is None else f'line {error.line}: '}{error.message}"
        for error in errors.data[:_MAX_ERRORS]
    ]


def fingerprint_of(source: Path) -> dict[str, str]:
    """What changes whenever a file is written to."""
    status = source.stat()
    return {"bytes": str(status.st_size), "modified_ns": str(status.st_mtime_ns)}
