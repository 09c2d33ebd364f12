"""Memory that a batch's tensors free stays with the process, for the next batch."""

from __future__ import annotations

import subprocess
import sys

import pytest

# The first large block that is freed. Later ones change glibc's own thresholds.
GIVEN_BACK = """
import os, sys, torch
from tokasaurus.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()

statm = os.open("/proc/self/statm", os.O_RDONLY)

def resident():
    return int(os.pread(statm, 100, 0).split()[1]) * os.sysconf("SC_PAGE_SIZE")

tensor = torch.ones(20 << 18)
used = resident()
del tensor
print(used - resident())
"""


def bytes_given_back(mode: str) -> int:
    """Of 20 MiB."""
    done = subprocess.run([sys.executable, "-c", GIVEN_BACK, mode], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is Linux's")
def test_freed_memory_is_kept_for_the_next_batch():
    """Counted in bytes: how many page faults they take depends on the size of the pages."""
    assert bytes_given_back("keep") < 4 << 20
    assert bytes_given_back("leave") > 16 << 20
