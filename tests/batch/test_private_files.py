"""Files and batches are for the user that runs the engine, and for no other user."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import RunningServer, with_config

from tokasaurus.batch.offline import OfflineJob
from tokasaurus.batch.records import Batch, StoredFile
from tokasaurus.batch.store import JobStore, NewAnswer, open_private

FORM = (
    b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\n'
    b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc\r\n--x--\r\n'
)


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def wrong_modes(directory: Path) -> dict[str, str]:
    paths = (directory, *directory.rglob("*"))
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in paths}
    return {
        str(path.relative_to(directory)): oct(mode)
        for path, mode in modes.items()
        if mode != (0o700 if path.is_dir() else 0o600)
    }


def fill(store: JobStore) -> None:
    store.path("in").write_bytes(b"x")
    store.add_file(StoredFile(id="in", bytes=1, created_at=0, filename="a", purpose="batch"))
    store.add_batch(
        Batch(id="b", endpoint=None, input_file_id="in", completion_window="", created_at=0)
    )
    store.record("b", [NewAnswer(1, b"y", False)])


def test_a_new_store_is_private(tmp_path: Path) -> None:
    directory = tmp_path / "parent" / "data"
    with contextlib.closing(JobStore(directory)) as store:
        fill(store)
        store.path("in").chmod(0o600)  # the store does not write this one
        assert {path.name for path in directory.glob("jobs*")} > {"jobs.sqlite3"}
        assert wrong_modes(directory) == {}


def test_what_an_earlier_version_left_is_closed(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    with contextlib.closing(JobStore(directory)) as store:
        fill(store)
    for path in (directory, *directory.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    with contextlib.closing(JobStore(directory)) as store:
        assert wrong_modes(directory) == {}
        assert store.batch("b").request_counts.completed == 1
        assert (directory / "lock").read_text() == f"{os.getpid()}\n"


def test_a_directory_that_has_other_files_too_keeps_its_mode(tmp_path: Path) -> None:
    """Somebody may name /tmp or a home; the contents are private all the same."""
    (tmp_path / "other").touch(0o644)
    tmp_path.chmod(0o755)
    with contextlib.closing(JobStore(tmp_path)) as store:
        fill(store)
        store.path("in").chmod(0o600)
        assert wrong_modes(tmp_path) == {".": "0o755", "other": "0o644"}


def test_a_mode_that_cannot_be_changed_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, mode: int) -> None:
        raise PermissionError

    tmp_path.chmod(0o755)
    monkeypatch.setattr(Path, "chmod", refuse)
    JobStore(tmp_path).close()
    assert f"{tmp_path} is open to other users" in caplog.text


def test_the_answers_of_an_offline_job_have_the_mode_of_any_new_file(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"prompt": "x"}))
    for mask in (0o022, 0o077):
        os.umask(mask)
        job = OfflineJob(source, target, "m")
        assert wrong_modes(job.directory) == {}
        open_private(job.store.path("out"), is_new=True).close()
        job.store.finish(job.batch_id, [], output_file_id="out")
        job.publish()
        assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~mask
        target.unlink()


def test_uploads_are_private(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    with RunningServer(with_config(data_dir=str(directory))).running() as server:
        content_type = {"Content-Type": "multipart/form-data; boundary=x"}
        assert server._ask("POST", "/v1/files", FORM, content_type).status == 200
        assert len(list((directory / "files").iterdir())) == 1
        assert wrong_modes(directory) == {}
