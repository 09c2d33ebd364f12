"""What survives a kill: files, batches and the answers of their lines, in one directory.

::

    DIRECTORY/lock            held by the one process that uses the directory
              jobs.sqlite3    the records of files and batches, and the place of each answer
              files/ID        the content of a file
              answers/ID      the answers of an unfinished batch, in the order in which they came

A line counts as answered once its row is committed. Its bytes are on the disk before that, behind
those of the last commit; what a killed process wrote there without a commit is overwritten. So each
line is answered exactly once, whenever the process ends.

Other users of the machine cannot read any of this: directories have mode 0700 and files 0600, and
what an earlier version left open is closed at the start.

Every method blocks on the disk. Only one thread may call them at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import sqlite3
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from tokasaurus.batch.records import FINAL_STATUSES, Batch, RequestCounts, StoredFile, Usage
from tokasaurus.errors import ConfigError, Conflict, NotFound, RequestError

__all__ = ["AnsweredLine", "DirectoryInUse", "JobStore", "NewAnswer", "open_private"]

log = logging.getLogger(__name__)

MAX_FILES = 10_000

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    purpose TEXT NOT NULL,
    expires_at INTEGER,
    record BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    input_file_id TEXT NOT NULL,
    is_final INTEGER NOT NULL DEFAULT 0,
    output_lifetime_s INTEGER,               -- of the files that it ends with
    answers_end INTEGER NOT NULL DEFAULT 0,  -- committed bytes of its file of answers
    record BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS answers (
    batch INTEGER NOT NULL,
    line INTEGER NOT NULL,
    start INTEGER NOT NULL,
    size INTEGER NOT NULL,
    is_error INTEGER NOT NULL,
    PRIMARY KEY (batch, line)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS dropped_files (  -- the latest, so that a list can continue after one
    dropped INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    number INTEGER NOT NULL
) STRICT;
"""
_VERSION = 1

_DATABASE = "jobs.sqlite3"
_OWN_NAMES = frozenset(
    {"lock", "files", "answers", *(f"{_DATABASE}{end}" for end in ("", "-wal", "-shm", "-journal"))}
)
_PRIVATE_DIRECTORY, _PRIVATE_FILE = 0o700, 0o600


@dataclass(frozen=True)
class NewAnswer:
    """A result line that is to be recorded."""

    line: int  # its number in the input file, from 1
    data: bytes  # with its newline
    is_error: bool
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True)
class AnsweredLine:
    """Where an answer is in the batch's file of answers."""

    start: int  # bytes
    size: int  # bytes
    is_error: bool


class DirectoryInUse(ConfigError):
    """Another process uses the directory."""


class JobStore:
    """The only user of a directory, which is created if it does not exist.

    Args:
        directory: its directory.
        max_bytes: the most that all files may have before uploads are refused. Results are always
            stored.
        disk_share: the same as a share of the disk, where max_bytes is None. If both are None,
            there is no limit.

    Raises:
        DirectoryInUse: another process uses the directory.
        ConfigError: it cannot be written, or a newer version of Tokasaurus has written it.
    """

    def __init__(
        self, directory: Path, max_bytes: int | None = None, disk_share: float | None = None
    ) -> None:
        self._directory = directory
        try:
            _make_private(directory)
            for path in (self._files, self._answers):
                path.mkdir(mode=_PRIVATE_DIRECTORY, exist_ok=True)
                _close_to_others(path)
            if max_bytes is None and disk_share is not None:
                # A file system that does not know its size says 0.
                max_bytes = int(shutil.disk_usage(directory).total * disk_share) or None
            self._max_bytes = max_bytes
            self._lock = _take_lock(directory)
            # SQLite gives its other files the mode of this one.
            open_private(directory / _DATABASE, is_new=False).close()
            self._database = sqlite3.connect(
                directory / _DATABASE, isolation_level=None, check_same_thread=False
            )
            self._set_up()
            self._clean()
            self._close_files_to_others()
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"{directory} cannot be used: {error}") from None

    def close(self) -> None:
        """Releases the directory."""
        self._database.close()
        self._lock.close()

    # --- files ------------------------------------------------------------------------------------

    def path(self, file_id: str) -> Path:
        """The place of a file's content, which must be written before ``add_file``."""
        return self._files / file_id

    def add_file(self, file: StoredFile) -> None:
        """Records a file whose content is written. Raises RequestError if there are too many."""
        (number,) = self._database.execute("SELECT count(*) FROM files").fetchone()
        if number >= MAX_FILES:
            raise RequestError(
                f"{number} files are stored, and there may be {MAX_FILES}; delete some", "file"
            )
        if self._max_bytes is not None:
            (stored,) = self._database.execute(
                "SELECT coalesce(sum(json_extract(CAST(record AS TEXT), '$.bytes')), 0) FROM files"
            ).fetchone()
            if stored + file.bytes > self._max_bytes:
                raise RequestError(
                    f"{stored} bytes are stored, and with these {file.bytes} there would be more"
                    f" than max_stored_bytes={self._max_bytes}; delete some files",
                    "file",
                )
        with self._transaction():
            self._insert_file(file)

    def file(self, file_id: str, now: float) -> StoredFile:
        """Returns the record of a file that has not expired. Raises NotFound."""
        row = self._database.execute(
            "SELECT record FROM files WHERE id = ? AND coalesce(expires_at > ?, 1)", (file_id, now)
        ).fetchone()
        if row is None:
            raise NotFound(f"there is no file {file_id!r}", "file_id")
        return msgspec.json.decode(row[0], type=StoredFile)

    def list_files(
        self, now: float, *, purpose: str | None, after: str | None, limit: int, ascending: bool
    ) -> tuple[list[StoredFile], bool]:
        """A page of files by time of creation, and whether there are more. Raises NotFound."""
        condition = "coalesce(expires_at > ?, 1)"
        values: list[Any] = [now]
        if purpose is not None:
            condition, values = condition + " AND purpose = ?", [*values, purpose]
        rows, more = self._page("files", condition, values, after, limit, ascending)
        return [msgspec.json.decode(row, type=StoredFile) for row in rows], more

    def delete_file(self, file_id: str, now: float) -> None:
        """Deletes a file. Raises NotFound, or Conflict if an unfinished batch reads it."""
        self.file(file_id, now)
        row = self._database.execute(
            "SELECT id FROM batches WHERE input_file_id = ? AND NOT is_final", (file_id,)
        ).fetchone()
        if row is not None:
            raise Conflict(
                f"{file_id} is the input of {row[0]}, which is not finished; cancel it first",
                "file_id",
            )
        self._drop_file(file_id)

    def drop_expired_files(self, now: float) -> None:
        """Deletes the expired files that no unfinished batch reads."""
        rows = self._database.execute(
            "SELECT id FROM files WHERE expires_at <= ? AND id NOT IN"
            " (SELECT input_file_id FROM batches WHERE NOT is_final)",
            (now,),
        ).fetchall()
        for (file_id,) in rows:
            self._drop_file(file_id)

    # --- batches ----------------------------------------------------------------------------------

    def add_batch(self, batch: Batch, output_lifetime_s: int | None = None) -> None:
        """Records a new batch."""
        with self._transaction():
            self._database.execute(
                "INSERT INTO batches (id, input_file_id, output_lifetime_s, record)"
                " VALUES (?, ?, ?, ?)",
                (batch.id, batch.input_file_id, output_lifetime_s, msgspec.json.encode(batch)),
            )

    def batch(self, batch_id: str) -> Batch:
        """Returns a batch. Raises NotFound."""
        return self._batch(batch_id)[1]

    def list_batches(self, *, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """A page of batches, newest first, and whether there are more. Raises NotFound."""
        rows, more = self._page("batches", "1", [], after, limit, ascending=False)
        return [msgspec.json.decode(row, type=Batch) for row in rows], more

    def unfinished_batches(self) -> list[str]:
        """Returns the ids of all unfinished batches, oldest first."""
        rows = self._database.execute("SELECT id FROM batches WHERE NOT is_final ORDER BY number")
        return [batch_id for (batch_id,) in rows]

    def drop_batch(self, batch_id: str) -> None:
        """Deletes a batch, its answers and its files. Raises NotFound."""
        number, batch = self._batch(batch_id)
        with self._transaction():
            self._database.execute("DELETE FROM answers WHERE batch = ?", (number,))
            self._database.execute("DELETE FROM batches WHERE number = ?", (number,))
        self.answers_path(batch_id).unlink(missing_ok=True)
        for file_id in (batch.input_file_id, batch.output_file_id, batch.error_file_id):
            if file_id is not None:
                self._drop_file(file_id)

    def change(self, batch_id: str, **fields: Any) -> Batch:
        """Sets fields of a batch, and returns the batch."""
        with self._transaction():
            return self._change(batch_id, fields)

    # --- lines ------------------------------------------------------------------------------------

    def forget_answers(self, batch_id: str) -> None:
        """Makes every line of a batch count as unanswered."""
        with self._transaction():
            number, _ = self._batch(batch_id)
            self._database.execute("DELETE FROM answers WHERE batch = ?", (number,))
            self._database.execute("UPDATE batches SET answers_end = 0 WHERE number = ?", (number,))
            self._change(batch_id, {"request_counts": RequestCounts(), "usage": Usage()})

    def record(self, batch_id: str, answers: Sequence[NewAnswer], **fields: Any) -> Batch:
        """Records answers of lines that had none, and sets fields of the batch: all, or nothing."""
        number, batch = self._batch(batch_id)
        (end,) = self._database.execute(
            "SELECT answers_end FROM batches WHERE number = ?", (number,)
        ).fetchone()
        rows, position = [], end
        for each in answers:
            rows.append((number, each.line, position, len(each.data), each.is_error))
            position += len(each.data)
        _write_at(self.answers_path(batch_id), end, [each.data for each in answers])
        num_errors = sum(each.is_error for each in answers)
        counts = batch.request_counts
        counts = RequestCounts(
            counts.total,
            counts.completed + len(answers) - num_errors,
            counts.failed + num_errors,
        )
        usage = sum((each.usage for each in answers), batch.usage)
        with self._transaction():
            self._database.executemany("INSERT INTO answers VALUES (?, ?, ?, ?, ?)", rows)
            self._database.execute(
                "UPDATE batches SET answers_end = ? WHERE number = ?", (position, number)
            )
            return self._change(batch_id, {"request_counts": counts, "usage": usage, **fields})

    def answered_lines(self, batch_id: str) -> dict[int, AnsweredLine]:
        """Returns the place of each answer, by line number."""
        number, _ = self._batch(batch_id)
        rows = self._database.execute(
            "SELECT line, start, size, is_error FROM answers WHERE batch = ?", (number,)
        )
        return {line: AnsweredLine(start, size, bool(error)) for line, start, size, error in rows}

    def answers_path(self, batch_id: str) -> Path:
        """The file of the answers of a batch."""
        return self._answers / batch_id

    def finish(self, batch_id: str, files: Sequence[StoredFile], **fields: Any) -> Batch:
        """Sets the last fields of a batch, and records the files that it ends with."""
        with self._transaction():
            number, _ = self._batch(batch_id)
            (lifetime_s,) = self._database.execute(
                "SELECT output_lifetime_s FROM batches WHERE number = ?", (number,)
            ).fetchone()
            for file in files:
                if lifetime_s is not None:
                    file = msgspec.structs.replace(file, expires_at=file.created_at + lifetime_s)
                self._insert_file(file)
            batch = self._change(batch_id, fields)
            self._database.execute("DELETE FROM answers WHERE batch = ?", (number,))
        self.answers_path(batch_id).unlink(missing_ok=True)
        return batch

    # --- inside -----------------------------------------------------------------------------------

    @property
    def _files(self) -> Path:
        return self._directory / "files"

    @property
    def _answers(self) -> Path:
        return self._directory / "answers"

    def _set_up(self) -> None:
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            raise sqlite3.DatabaseError("a newer version of Tokasaurus has written it")
        self._database.executescript(_SCHEMA)
        self._database.execute(f"PRAGMA user_version = {_VERSION}")

    def _clean(self) -> None:
        """Deletes contents without a record, which a killed process has left."""
        ids = {file_id for (file_id,) in self._database.execute("SELECT id FROM files")}
        unfinished = set(self.unfinished_batches())
        for path in (*self._files.iterdir(), *self._answers.iterdir()):
            if path.name not in (ids if path.parent == self._files else unfinished):
                path.unlink()

    def _close_files_to_others(self) -> None:
        own = (self._directory / name for name in _OWN_NAMES)
        for path in (*own, *self._files.iterdir(), *self._answers.iterdir()):
            if path.is_file():
                _close_to_others(path)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:  # if the disk is full, SQLite has rolled it back
                self._database.execute("ROLLBACK")
            raise

    def _insert_file(self, file: StoredFile) -> None:
        self._database.execute(
            "INSERT INTO files (id, purpose, expires_at, record) VALUES (?, ?, ?, ?)",
            (file.id, file.purpose, file.expires_at, msgspec.json.encode(file)),
        )

    def _drop_file(self, file_id: str) -> None:
        with self._transaction():
            self._database.execute(
                "INSERT INTO dropped_files (id, number) SELECT id, number FROM files WHERE id = ?",
                (file_id,),
            )
            self._database.execute(
                "DELETE FROM dropped_files WHERE dropped <= last_insert_rowid() - ?", (MAX_FILES,)
            )
            self._database.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self.path(file_id).unlink(missing_ok=True)

    def _batch(self, batch_id: str) -> tuple[int, Batch]:
        row = self._database.execute(
            "SELECT number, record FROM batches WHERE id = ?", (batch_id,)
        ).fetchone()
        if row is None:
            raise NotFound(f"there is no batch {batch_id!r}", "batch_id")
        return row[0], msgspec.json.decode(row[1], type=Batch)

    def _change(self, batch_id: str, fields: Mapping[str, Any]) -> Batch:
        batch = msgspec.structs.replace(self._batch(batch_id)[1], **fields)
        self._database.execute(
            "UPDATE batches SET record = ?, is_final = ? WHERE id = ?",
            (msgspec.json.encode(batch), batch.status in FINAL_STATUSES, batch_id),
        )
        return batch

    def _page(
        self,
        table: str,
        condition: str,
        values: list[Any],
        after: str | None,
        limit: int,
        ascending: bool,
    ) -> tuple[list[bytes], bool]:
        if after is not None:
            tables = ("files", "dropped_files") if table == "files" else (table,)
            found = (f"SELECT number FROM {each} WHERE id = :id" for each in tables)
            row = self._database.execute(" UNION ".join(found), {"id": after}).fetchone()
            if row is None:
                raise NotFound(
                    f"after must be an id from this list; there is no {after!r}", "after"
                )
            condition += f" AND number {'>' if ascending else '<'} ?"
            values = [*values, row[0]]
        order = "ASC" if ascending else "DESC"
        rows = self._database.execute(
            f"SELECT record FROM {table} WHERE {condition} ORDER BY number {order} LIMIT ?",
            (*values, limit + 1),
        ).fetchall()
        return [record for (record,) in rows[:limit]], len(rows) > limit


def open_private(path: Path, *, is_new: bool) -> BinaryIO:
    """Opens a file, which is created if it does not exist, so that its owner alone may read it.

    Args:
        path: of the file.
        is_new: whether its former content goes.
    """
    flags = os.O_RDWR | os.O_CREAT | (os.O_TRUNC if is_new else 0)
    return open(os.open(path, flags, _PRIVATE_FILE), "r+b")


def _make_private(directory: Path) -> None:
    """Makes a directory, or closes one to others unless somebody uses it for other things, too."""
    try:
        directory.mkdir(mode=_PRIVATE_DIRECTORY, parents=True)
    except FileExistsError:
        if {each.name for each in directory.iterdir()} <= _OWN_NAMES:
            _close_to_others(directory)


def _close_to_others(path: Path) -> None:
    """Takes all rights from the group and from others, if the path is this user's."""
    mode = stat.S_IMODE(path.stat().st_mode)
    private = mode & stat.S_IRWXU
    if mode == private:
        return
    try:
        path.chmod(private)
    except PermissionError:
        log.warning("%s is open to other users, and its mode cannot be changed", path)


def _take_lock(directory: Path) -> Any:
    """Locks the directory until the file that is returned is closed, or the process ends.

    Raises:
        DirectoryInUse: another process holds the lock.
    """
    file = os.fdopen(os.open(directory / "lock", os.O_RDWR | os.O_CREAT, _PRIVATE_FILE), "r+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise DirectoryInUse(
            f"{directory} is in use by another process (process id {owner}); stop that first"
        ) from None
    file.seek(0)
    file.truncate()
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _write_at(path: Path, start: int, pieces: Sequence[bytes]) -> None:
    with open_private(path, is_new=False) as file:
        file.seek(start)
        file.writelines(pieces)
        file.truncate()
        file.flush()
        os.fdatasync(file.fileno())
