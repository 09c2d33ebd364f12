"""Whatever kills a process that answers batches, the next one goes on, and each line is answered exactly once."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from batch_process import CRASHES, URL
from engine_process import EngineProcess

from tokasaurus.batch.records import Batch, StoredFile, new_id
from tokasaurus.batch.store import JobStore
from tokasaurus.errors import ConfigError

SCRIPT = Path(__file__).with_name("batch_process.py")


def new_batch(directory: Path, num_lines: int) -> str:
    """A batch of that many lines; each thirteenth is no JSON."""
    store = JobStore(directory)
    lines = []
    for number in range(num_lines):
        line = {"custom_id": str(number), "method": "POST", "url": URL, "body": {"number": number}}
        lines.append("{" if number % 13 == 12 else json.dumps(line))
    now = int(time.time())
    file = StoredFile(id=new_id("file"), bytes=1, created_at=now, filename="a", purpose="batch")
    store.path(file.id).write_text("\n".join(lines))
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


def check(directory: Path, batch_id: str, num_lines: int) -> None:
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


def start(directory: Path, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, SCRIPT, directory, *map(str, arguments)])


def test_twenty_kills_at_random_moments(tmp_path):
    num_lines, rng = 3000, random.Random(time.time_ns())
    batch_id = new_batch(tmp_path, num_lines)
    for _ in range(20):
        process = start(tmp_path)
        time.sleep(rng.uniform(0.05, 0.7))
        process.kill()
        process.wait()
    assert start(tmp_path).wait(60) == 0
    check(tmp_path, batch_id, num_lines)


@pytest.mark.parametrize("crash", CRASHES)
def test_a_kill_at_each_of_the_moments_that_matter(tmp_path, crash):
    batch_id = new_batch(tmp_path, 100)
    after = {"the batch is finished, its answers not deleted": 6}.get(crash, 1)
    if "answers are" in crash:
        after = 3
    assert start(tmp_path, crash, after).wait(60) == -signal.SIGKILL
    assert start(tmp_path).wait(60) == 0
    check(tmp_path, batch_id, 100)


def test_a_directory_has_one_owner_at_a_time(tmp_path):
    store = JobStore(tmp_path)
    with pytest.raises(ConfigError, match=r"in use .*process id \d+"):
        JobStore(tmp_path)
    store.close()
    JobStore(tmp_path).close()


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be used"):
        JobStore(tmp_path / "file" / "data")


# --- the whole engine ------------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.parametrize(
    ("num_kills", "num_lines"), [(1, 100), pytest.param(20, 6000, marks=pytest.mark.long)]
)
def test_an_engine_that_is_killed(tmp_path, num_kills, num_lines):
    rng = random.Random(time.time_ns())
    lines = []
    for number in range(num_lines):
        body = {"prompt": f"{number} and", "max_tokens": rng.randint(1, 60), "seed": number}
        line = {"custom_id": f"{number}", "method": "POST", "url": URL, "body": body}
        lines.append(json.dumps(line))
    flags = (f"data_dir={tmp_path / 'data'}", "uvicorn_log_level=warning")
    batch_id = None
    for kill in range(num_kills + 1):
        engine = EngineProcess(tmp_path / "toka.log", *flags)
        try:
            engine.wait_ready()
            client = engine.client()
            if batch_id is None:
                file = client.files.create(file="\n".join(lines).encode(), purpose="batch")
                batch_id = client.batches.create(
                    input_file_id=file.id, endpoint=URL, completion_window="24h"
                ).id
            if kill < num_kills:
                time.sleep(rng.uniform(0, 1.5))
                engine.signal(signal.SIGKILL)
                engine.process.wait()
                continue
            while (batch := client.batches.retrieve(batch_id)).status != "completed":
                assert batch.status in ("validating", "in_progress", "finalizing"), batch
                time.sleep(0.1)
            answers = client.files.content(batch.output_file_id).text.splitlines()
            assert [json.loads(line)["custom_id"] for line in answers] == [
                str(number) for number in range(num_lines)
            ]
            assert batch.request_counts.completed == num_lines
        finally:
            engine.stop()


@pytest.mark.engine
def test_a_second_engine_on_the_directory_is_refused(tmp_path, engine):
    data_dir = engine.log_path.parent / "data"
    second = EngineProcess(tmp_path / "toka.log", f"data_dir={data_dir}")
    assert second.wait_exit(60) != 0
    assert f"data_dir: {data_dir} is in use by another process" in second.log
