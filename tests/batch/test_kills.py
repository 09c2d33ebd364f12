"""A process that answers batches may be killed at any moment: the next one continues, and each line
is answered exactly once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import openai
import pytest
from echo_batches import check, new_batch
from echo_process import CRASHES, MAX_ANSWER_S, MAX_SAMPLES, URL, run
from engine_process import EngineProcess, running, started

from tokasaurus.batch.store import JobStore
from tokasaurus.errors import ConfigError

SCRIPT = Path(__file__).with_name("echo_process.py")


def exit_status(directory: Path, moment: str) -> int:
    """How a process ends that is to die at a moment."""
    return subprocess.run([sys.executable, SCRIPT, directory, moment], timeout=60).returncode


@pytest.mark.parametrize("num_kills", [6, pytest.param(20, marks=pytest.mark.long)])
def test_kills_at_random_moments(tmp_path, num_kills):
    num_lines = 100 * num_kills
    batch_id = new_batch(tmp_path, num_lines)
    # All kills together come before the batch can be finished.
    most_s = 0.75 * num_lines * MAX_ANSWER_S / 2 / MAX_SAMPLES / num_kills
    rng = random.Random(time.time_ns())
    for _ in range(num_kills):
        seconds = rng.uniform(0.001, most_s)
        assert exit_status(tmp_path, f"{seconds}") == -signal.SIGALRM
    asyncio.run(run(tmp_path))
    check(tmp_path, batch_id, num_lines)


@pytest.mark.parametrize("moment", CRASHES)
def test_a_kill_right_after(tmp_path, moment):
    batch_id = new_batch(tmp_path, 100)
    assert exit_status(tmp_path, moment) == -signal.SIGKILL
    has_answers = bool(list((tmp_path / "answers").iterdir()))
    assert has_answers == (CRASHES[moment].status != "validating")
    with contextlib.closing(JobStore(tmp_path)) as store:
        assert store.batch(batch_id).status == CRASHES[moment].status
    asyncio.run(run(tmp_path))
    check(tmp_path, batch_id, 100)


def test_a_directory_has_one_owner_at_a_time(tmp_path):
    store = JobStore(tmp_path)
    with pytest.raises(ConfigError, match=r"in use .*process id \d+"):
        JobStore(tmp_path)
    store.close()
    JobStore(tmp_path).close()


def test_a_directory_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be used"):
        JobStore(tmp_path / "file" / "data")


# --- the whole engine -----------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.processes
@pytest.mark.parametrize(
    ("num_kills", "num_lines", "max_seqs"),
    [(1, 60, 4), pytest.param(20, 6000, 64, marks=pytest.mark.long)],
)
def test_an_engine_that_is_killed_continues_its_batch(tmp_path, num_kills, num_lines, max_seqs):
    rng = random.Random(time.time_ns())
    lines = []
    for number in range(num_lines):
        body = {"prompt": f"{number} and", "max_tokens": rng.randint(1, 60), "seed": number}
        line = {"custom_id": f"{number}", "method": "POST", "url": URL, "body": body}
        lines.append(json.dumps(line))
    share = num_lines // (num_kills + 1)
    batch_id = None
    for kill in range(num_kills):
        # Few sequences at a time, so that the batch is not finished before the engine is killed.
        with engine_on(tmp_path, f"max_seqs_per_forward={max_seqs}") as engine:
            with pytest.raises(ConfigError, match="in use by another process"):
                JobStore(tmp_path / "data")
            client = engine.client()
            if batch_id is None:
                file = client.files.create(file="\n".join(lines).encode(), purpose="batch")
                batch_id = client.batches.create(
                    input_file_id=file.id, endpoint=URL, completion_window="24h"
                ).id
            wait_for_answers(client, batch_id, kill * share + rng.randrange(share))
            engine.signal(signal.SIGKILL)
            engine.process.wait()
    with engine_on(tmp_path) as engine:
        client = engine.client()
        wait_for_answers(client, batch_id, num_lines)
        while (batch := client.batches.retrieve(batch_id)).status != "completed":
            assert batch.status in ("in_progress", "finalizing"), batch
            time.sleep(0.02)
        answers = client.files.content(batch.output_file_id).text.splitlines()
    assert [json.loads(line)["custom_id"] for line in answers] == [
        str(number) for number in range(num_lines)
    ]
    assert batch.request_counts.completed == num_lines


def engine_on(directory: Path, *flags: str) -> AbstractContextManager[EngineProcess]:
    """A small engine, which starts sooner."""
    data_dir = f"data_dir={directory / 'data'}"
    small = ("max_tokens_per_forward=256", "kv_cache_num_tokens=8192")
    return running(directory, data_dir, "uvicorn_log_level=warning", *small, *flags)


def wait_for_answers(client: openai.OpenAI, batch_id: str, number: int) -> None:
    """Returns when at least ``number`` lines are answered."""
    while (batch := client.batches.retrieve(batch_id)).request_counts.completed < number:
        assert batch.status in ("validating", "in_progress"), batch
        time.sleep(0.02)


@pytest.mark.engine
@pytest.mark.processes
def test_an_engine_is_refused_a_directory_that_another_process_uses(tmp_path):
    data_dir = tmp_path / "data"
    store = JobStore(data_dir)
    with started(tmp_path, f"data_dir={data_dir}") as second:
        assert second.wait_exit(60) != 0
    store.close()
    assert f"data_dir: {data_dir} is in use by another process" in second.log
