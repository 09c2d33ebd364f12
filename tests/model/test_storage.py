"""Memory of weights and of the KV cache."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokasaurus.model.storage import Region

CPU = torch.device("cpu")
SHAPES = ((3, 5), (1,), (1 << 20, 3), (7,), (300, 70_000), (0, 4), (2, 3, 4))


def test_tensors_of_a_region_do_not_overlap():
    region = Region()
    tensors = [
        region.empty(shape, dtype, CPU)
        for dtype in (torch.float32, torch.bfloat16, torch.int8)
        for shape in SHAPES
    ]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    for number, tensor in enumerate(tensors):
        assert tensor.shape == SHAPES[number % len(SHAPES)]
        assert tensor.is_contiguous()
        assert (tensor == number).all(), number
        assert tensor.numel() == 0 or tensor.data_ptr() % 64 == 0


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="there is no such advice")
def test_a_system_without_huge_pages_has_memory_all_the_same(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *advice):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    tensor = Region().empty((3, 5), torch.float32, CPU)
    assert (tensor.fill_(1) == 1).all()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_released_memory_returns_to_the_system():
    region = Region()
    tensors = [region.empty((10 << 20,), torch.float32, CPU) for _ in range(4)]
    for _ in range(2):
        before = resident()
        for tensor in tensors:
            tensor.fill_(1)
        assert resident() - before > 155 << 20
        region.release(*tensors)
        assert resident() - before < 5 << 20
        assert [tensor.shape for tensor in tensors] == [(10 << 20,)] * 4
        region.restore(*tensors)


_HUGE_PAGES = """
import torch
from tokasaurus.model.storage import Region
region = Region()
# Most weights of a small model are smaller than a huge page, and written after all are there.
tensors = [region.empty((576, 300), torch.float32, torch.device("cpu")) for _ in range(100)]
for tensor in tensors:
    tensor.fill_(1)
words = open("/proc/self/smaps_rollup").read().split()
print(int(words[words.index("AnonHugePages:") + 1]) << 10)
"""


def has_huge_pages() -> bool:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return (
        hasattr(mmap, "MADV_HUGEPAGE")
        and setting.exists()
        and "[never]" not in (setting.read_text())
    )


@pytest.mark.skipif(not has_huge_pages(), reason="the system has no huge pages")
def test_weights_lie_in_huge_pages():
    done = subprocess.run([sys.executable, "-c", _HUGE_PAGES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0.9 * 100 * 576 * 300 * 4
