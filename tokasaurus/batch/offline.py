"""A batch without a server, from one file to another.

::

    OUT.toka-batch/    a JobStore with one batch, deleted when OUT is complete
    OUT                the output: it appears whole, when every line has an answer
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from tokasaurus.batch.records import Batch, StoredFile, new_id
from tokasaurus.batch.store import JobStore
from tokasaurus.batch.tables import import_requests, is_parquet, load_pyarrow, write_parquet
from tokasaurus.errors import ConfigError

__all__ = ["OfflineJob"]


class OfflineJob:
    """A new job, or the rest of one that was stopped.

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

    def publish(self) -> None:
        """Moves the output of the finished batch to the target, and deletes everything else."""
        file_id = self.batch.output_file_id
        output = self.store.path(file_id or "none")
        if output.exists():  # otherwise an earlier run has moved it
            if is_parquet(self.target):
                table = self.directory / "output.parquet"
                write_parquet(output, table)
                os.replace(table, self.target)
            else:
                new = self.directory / "new"
                new.touch()
                output.chmod(new.stat().st_mode)  # the store's files are private
                os.replace(output, self.target)
        self.drop()

    def drop(self) -> None:
        """Deletes the job's directory."""
        self.store.close()
        shutil.rmtree(self.directory)

    def _unfinished(self, source: Path) -> str | None:
        batches, _ = self.store.list_batches(after=None, limit=1)
        if not batches:
            return None
        if batches[0].metadata != _fingerprint(source):
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
        now = int(time.time())
        fingerprint = _fingerprint(source)
        file_id = new_id("file")
        path = self.store.path(file_id)
        import_requests(source, path)
        self.store.add_file(
            StoredFile(
                id=file_id,
                bytes=path.stat().st_size,
                created_at=now,
                filename=source.name,
                purpose="batch",
            )
        )
        batch = Batch(
            id=new_id("batch"),
            endpoint=None,
            input_file_id=file_id,
            completion_window="",
            created_at=now,
            metadata=fingerprint,
            model=self._model,
        )
        self.store.add_batch(batch)
        return batch.id


def _fingerprint(source: Path) -> dict[str, str]:
    """What changes whenever a file is written to."""
    status = source.stat()
    return {"bytes": str(status.st_size), "modified_ns": str(status.st_mtime_ns)}
