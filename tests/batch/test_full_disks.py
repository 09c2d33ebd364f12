"""What happens when the disk has no room, and once it has room again."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import resource
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from echo_batches import check, new_batch
from echo_process import echo_runner

from tokasaurus.batch import runner as runner_module
from tokasaurus.batch.records import StoredFile, new_id
from tokasaurus.batch.store import JobStore
from tokasaurus.errors import RequestError


@contextlib.contextmanager
def no_file_larger_than(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def file_of(filename: str) -> StoredFile:
    return StoredFile(
        id=new_id("file"),
        bytes=1,
        created_at=int(time.time()),
        filename=filename,
        purpose="batch",
    )


def test_a_store_can_be_used_after_a_failed_commit(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    num_bytes = (tmp_path / "jobs.sqlite3-wal").stat().st_size
    with no_file_larger_than(num_bytes), pytest.raises(sqlite3.Error):
        store.add_file(file_of("a" * 10_000))
    kept = file_of("b")
    store.add_file(kept)
    files, _ = store.list_files(0, purpose=None, after=None, limit=10, ascending=True)
    assert files == [kept]
    store.close()


def test_results_are_written_again_after_the_disk_was_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = new_batch(tmp_path, 30)
    monkeypatch.setattr(runner_module, "_RETRY_S", 0.01)
    write_results, num_calls = runner_module.write_results, 0

    def failing_twice(*args):
        nonlocal num_calls
        num_calls += 1
        counts = write_results(*args)
        if num_calls <= 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return counts

    monkeypatch.setattr(runner_module, "write_results", failing_twice)

    async def run() -> None:
        runner = echo_runner(tmp_path)
        await runner.start()
        await runner.wait(batch_id)
        names = {path.name for path in (tmp_path / "files").iterdir()}
        await runner.close()
        assert len(names) == 3, "a failed attempt left its files"

    asyncio.run(run())
    check(tmp_path, batch_id, 30)


def test_files_may_fill_a_share_of_the_disk(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(total=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    file = StoredFile(
        id="a", bytes=100, created_at=0, filename="a", purpose="batch", expires_at=None
    )
    with contextlib.closing(JobStore(tmp_path, disk_share=0.1)) as store:
        store.add_file(file)
        with pytest.raises(RequestError, match="max_stored_bytes=100;"):
            store.add_file(msgspec.structs.replace(file, id="b", bytes=1))
    with contextlib.closing(JobStore(tmp_path, 101, disk_share=0.1)) as store:
        store.add_file(msgspec.structs.replace(file, id="c", bytes=1))
    with contextlib.closing(JobStore(tmp_path)) as store:  # as offline jobs have it
        store.add_file(msgspec.structs.replace(file, id="d", bytes=1 << 50))
