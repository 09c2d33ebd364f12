"""Memory that a batch's tensors free serves the next batch without a page fault."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Several blocks that lie at the top of the heap together, freed and allocated again and again.
FAULTS = """
import resource, sys, torch
from tokasaurus.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()

def run_batch():
    for _ in range(2):  # in two layers
        tensors = [torch.ones(1 << 18) for _ in range(16)]
        del tensors

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

run_batch()
before = faults()
for _ in range(20):
    run_batch()
print(faults() - before)
"""


def count_faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is Linux's")
def test_freed_memory_is_used_again_without_page_faults():
    assert count_faults("keep") < count_faults("leave") / 10
