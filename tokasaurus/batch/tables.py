"""Files that ``toka-batch`` reads and writes: JSONL or Parquet, batch lines or bare bodies."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import msgspec

from tokasaurus import untrusted_json
from tokasaurus.batch.lines import MAX_LINE_BYTES, line_name, lines_in
from tokasaurus.batch.store import open_private
from tokasaurus.errors import ConfigError

__all__ = [
    "import_requests",
    "is_parquet",
    "load_pyarrow",
    "requests_in",
    "write_parquet",
    "write_table",
]

_URLS = {"prompt": "/v1/completions", "messages": "/v1/chat/completions"}
_ROWS = 256  # of a table, read or written at once


def is_parquet(path: PurePath) -> bool:
    """Whether a file's name says that it is Parquet."""
    return path.suffix.lower() == ".parquet"


def import_requests(source: Path, target: Path) -> None:
    """Writes every request of a file as a line of a batch, with the number that it has there.

    What is not a request is copied as it is, and fails when the batch runs.

    Raises:
        ConfigError: the file cannot be read.
    """
    with source.open("rb") as requests, open_private(target, is_new=True) as file:
        num_written = 0
        for number, line in requests_in(requests, source):
            if line is None:
                raise ConfigError(
                    f"{source}: line {number} is too long: a line may have at most"
                    f" {MAX_LINE_BYTES} bytes"
                )
            num_blank = number - 1 - num_written
            file.write(b"\n" * num_blank + line + b"\n")
            num_written = number


def requests_in(file: BinaryIO, path: PurePath) -> Iterator[tuple[int, bytes | None]]:
    """Yields the number of every request of a file, and the request as a batch line.

    The number is that of the line, where blank lines count, or of the row of a table, from 1. The
    line is None if it is too long. What is not a request is yielded as it is.

    Args:
        file: the open file, JSONL or Parquet.
        path: its name, which says which of the two it is.

    Raises:
        ConfigError: the file cannot be read.
    """
    lines: Iterator[tuple[int, bytes | None]]
    if is_parquet(path):
        lines = enumerate(_rows_as_lines(file, path), 1)
    else:
        lines = lines_in(file)
    for number, line in lines:
        yield number, None if line is None else _as_batch_line(number, line)


def _as_batch_line(number: int, line: bytes) -> bytes:
    """Wraps a line that is only the body of a request."""
    try:
        fields = untrusted_json.decode(line)
    except ValueError:
        return line
    if not isinstance(fields, dict) or "body" in fields or "url" in fields:
        return line
    url = next((url for name, url in _URLS.items() if fields.get(name) is not None), None)
    if url is None:
        return line
    custom_id = fields.pop("custom_id", None)
    custom_id = line_name(number) if custom_id is None else custom_id
    wrapped = {"custom_id": custom_id, "method": "POST", "url": url, "body": fields}
    return msgspec.json.encode(wrapped)


def _rows_as_lines(file: BinaryIO, path: PurePath) -> Iterator[bytes]:
    pyarrow, parquet = load_pyarrow()
    try:
        table = parquet.ParquetFile(file)
        for rows in table.iter_batches(_ROWS):
            for row in rows.to_pylist():
                yield msgspec.json.encode(_without_nulls(row))
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path} cannot be read as Parquet: {error}") from None


def _without_nulls(row: Any) -> Any:
    """Drops the nulls, which stand in a column where a row does not have the field."""
    if isinstance(row, dict):
        kept = {name: _without_nulls(each) for name, each in row.items() if each is not None}
        body = kept.get("body")
        if isinstance(body, str):  # JSON as text, since each row may have another shape
            with contextlib.suppress(ValueError):
                kept["body"] = untrusted_json.decode(body.encode())
        return kept
    return [_without_nulls(each) for each in row] if isinstance(row, list) else row


def write_parquet(lines: Path, target: Path) -> None:
    """Writes a file of result lines as a table, as ``write_table`` does."""
    with lines.open("rb") as file, target.open("wb") as table:
        write_table(file, table)


def write_table(lines: Iterable[bytes], target: BinaryIO) -> None:
    """Writes result lines as a table: custom_id, status_code, text, and body and error as JSON.

    ``text`` is that of the first choice.
    """
    lines = iter(lines)
    pyarrow, parquet = load_pyarrow()
    text = pyarrow.string()
    names = {"custom_id": text, "status_code": pyarrow.int32(), "text": text}
    schema = pyarrow.schema({**names, "body": text, "error": text})
    with parquet.ParquetWriter(target, schema) as writer:
        while rows := [_as_row(json.loads(line)) for line in itertools.islice(lines, _ROWS)]:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def _as_row(line: dict[str, Any]) -> dict[str, Any]:
    response, error = line["response"] or {}, line["error"]
    body = response.get("body")
    return {
        "custom_id": line["custom_id"],
        "status_code": response.get("status_code"),
        "text": _first_text(body),
        "body": None if body is None else json.dumps(body, ensure_ascii=False),
        "error": None if error is None else json.dumps(error, ensure_ascii=False),
    }


def _first_text(body: Any) -> str | None:
    choices = body.get("choices") if isinstance(body, dict) else None
    if not choices:
        return None
    choice = choices[0]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return text if isinstance(text, str) else None


def load_pyarrow() -> tuple[Any, Any]:
    """Imports pyarrow and pyarrow.parquet. Raises ConfigError if they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            "Parquet needs pyarrow: pip install 'tokasaurus[parquet]'; or use JSONL"
        ) from None
    return pyarrow, pyarrow.parquet
