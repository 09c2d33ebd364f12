"""Large batches run in bounded memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import echo_process
import pytest
from echo_batches import input_line, store_batch

from tokasaurus.batch.store import JobStore

_MOST_GROWTH_KIB = 40_000

_RUN = """
import asyncio, pathlib, runpy, sys

def peak_kib():
    return next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]

run = runpy.run_path(sys.argv[1])["run"]
print(peak_kib())
asyncio.run(run(pathlib.Path(sys.argv[2])))
print(peak_kib())
"""


@pytest.mark.parametrize(
    ("num_lines", "line_bytes"),
    [
        pytest.param(1_000, 64_000, id="64 MB"),
        pytest.param(50_000, 4_000, id="200 MB", marks=pytest.mark.long),
    ],
)
def test_a_batch_is_not_held_in_memory(tmp_path: Path, num_lines: int, line_bytes: int) -> None:
    line = input_line(0, prompt="x" * line_bytes)
    first, rest = line.split('"0"')
    batch_id = store_batch(tmp_path, (f'{first}"{i}"{rest}' for i in range(num_lines)))
    command = [sys.executable, "-c", _RUN, echo_process.__file__, tmp_path]
    process = subprocess.run(command, capture_output=True, check=True)
    before_kib, after_kib = map(int, process.stdout.split())
    assert after_kib - before_kib < _MOST_GROWTH_KIB
    store = JobStore(tmp_path)
    assert store.batch(batch_id).request_counts.completed == num_lines
    store.close()
