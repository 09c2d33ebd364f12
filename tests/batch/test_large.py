"""The largest batch there may be, in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from batch_process import URL
from test_kills import SCRIPT

from tokasaurus.batch.records import Batch, StoredFile, new_id
from tokasaurus.batch.store import JobStore

_RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def test_lines_are_not_held_in_memory(tmp_path):
    run(tmp_path, num_lines=2_000, line_bytes=32_000)  # 64 MB


@pytest.mark.long
def test_50_000_lines_of_200_mb(tmp_path):
    run(tmp_path, num_lines=50_000, line_bytes=4_000)


def run(directory: Path, num_lines: int, line_bytes: int) -> None:
    store = JobStore(directory)
    file = StoredFile(id=new_id("file"), bytes=1, created_at=0, filename="a", purpose="batch")
    with store.path(file.id).open("w") as lines:
        for number in range(num_lines):
            body = {"number": 0, "prompt": "x" * line_bytes}
            line = {"custom_id": str(number), "method": "POST", "url": URL, "body": body}
            lines.write(json.dumps(line) + "\n")
    store.add_file(file)
    batch = Batch(
        id=new_id("batch"),
        endpoint=URL,
        input_file_id=file.id,
        completion_window="24h",
        created_at=0,
    )
    store.add_batch(batch)
    store.close()
    process = subprocess.run(
        [sys.executable, "-c", _RUN, SCRIPT, directory], capture_output=True, check=True
    )
    assert int(process.stdout) < 100_000  # KiB, of which Python and its libraries are about 30,000
    store = JobStore(directory)
    assert store.batch(batch.id).request_counts.completed == num_lines
    store.close()
