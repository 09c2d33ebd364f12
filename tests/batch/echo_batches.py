"""Batches for ``echo_process``, and the check that every line of one was answered exactly once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

from echo_process import URL

from tokasaurus.batch.records import Batch, StoredFile, new_id
from tokasaurus.batch.store import JobStore


def input_line(number: int, **fields: object) -> str:
    body = {"number": number, **fields}
    return json.dumps({"custom_id": str(number), "method": "POST", "url": URL, "body": body})


def store_batch(directory: Path, lines: Iterable[str]) -> str:
    """Stores a batch that is to be run; returns its id."""
    store = JobStore(directory)
    now = int(time.time())
    file = StoredFile(id=new_id("file"), bytes=1, created_at=now, filename="a", purpose="batch")
    with store.path(file.id).open("w") as content:
        content.writelines(line + "\n" for line in lines)
    store.add_file(file)
    batch = Batch(
        id=new_id("batch"),
        endpoint=URL,
        input_file_id=file.id,
        completion_window="24h",
        created_at=now,
        expires_at=now + 86400,
    )
    store.add_batch(batch)
    store.close()
    return batch.id


def new_batch(directory: Path, num_lines: int) -> str:
    """Stores a batch in which every thirteenth line is not JSON."""
    lines = ("{" if number % 13 == 12 else input_line(number) for number in range(num_lines))
    return store_batch(directory, lines)


def check(directory: Path, batch_id: str, num_lines: int) -> None:
    """Asserts that a batch of ``new_batch`` is complete, and that nothing else is left."""
    store = JobStore(directory)
    batch = store.batch(batch_id)
    assert batch.status == "completed"
    bad = [number for number in range(num_lines) if number % 13 == 12]
    refused = [number for number in range(num_lines) if number % 10 == 9 and number % 13 != 12]
    good = [n for n in range(num_lines) if n not in set(bad) | set(refused)]
    counts = batch.request_counts
    assert (counts.total, counts.completed) == (num_lines, len(good))
    assert counts.failed == len(bad) + len(refused)
    output = [json.loads(line) for line in store.path(batch.output_file_id).open()]
    assert [int(line["custom_id"]) for line in output] == good
    assert [line["response"]["body"]["echo"] for line in output] == good
    errors = [json.loads(line) for line in store.path(batch.error_file_id).open()]
    assert [int(line["custom_id"]) for line in errors if line["error"] is None] == refused
    assert sum(line["error"] is not None for line in errors) == len(bad)
    assert batch.usage.output_tokens == sum(good)
    files = {batch.input_file_id, batch.output_file_id, batch.error_file_id}
    assert {path.name for path in (directory / "files").iterdir()} == files
    assert list((directory / "answers").iterdir()) == []
    store.close()
