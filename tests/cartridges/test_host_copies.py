"""Files that are kept in the memory of the host."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

from tokasaurus.cartridges import host_copies as host_copies_module
from tokasaurus.cartridges.host_copies import HostCopies

PAGE = mmap.PAGESIZE


def write(path: Path, num_pages: int) -> Path:
    """A file that is not in memory, unless its file system has nothing else."""
    path.write_bytes(bytes(num_pages * PAGE))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def num_resident(path: Path) -> int:
    """Pages of a file that are in memory, as the system says."""
    with open(path, "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        pages = (ctypes.c_ubyte * (len(mapped) // PAGE))()
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), len(mapped), pages) == 0
        return sum(each & 1 for each in pages)


def test_a_file_is_read_into_memory_whole(tmp_path):
    path = write(tmp_path / "a", 64)
    copies = HostCopies(100 * PAGE)
    copies.keep("a", path)
    assert "a" in copies
    assert copies.num_bytes == 64 * PAGE
    assert num_resident(path) == 64


def test_an_old_system_reads_page_by_page(tmp_path, monkeypatch):
    monkeypatch.setattr(host_copies_module, "_POPULATE_READ", -1)
    path = write(tmp_path / "a", 64)
    HostCopies(100 * PAGE).keep("a", path)
    assert num_resident(path) == 64


def test_those_not_used_for_longest_go_first(tmp_path):
    copies = HostCopies(3 * PAGE)
    for name in "abc":
        copies.keep(name, write(tmp_path / name, 1))
    assert copies.touch("a")
    copies.keep("d", write(tmp_path / "d", 1))
    assert [name for name in "abcd" if name in copies] == ["a", "c", "d"]
    copies.keep("e", write(tmp_path / "e", 2))
    assert [name for name in "abcde" if name in copies] == ["d", "e"]
    copies.drop("d")
    assert not copies.touch("d")
    assert copies.num_bytes == 2 * PAGE


def test_what_is_too_large_or_gone_is_not_kept(tmp_path):
    copies = HostCopies(3 * PAGE)
    copies.keep("a", write(tmp_path / "a", 1))
    copies.keep("large", write(tmp_path / "large", 4))
    copies.keep("gone", tmp_path / "gone")
    copies.keep("empty", write(tmp_path / "empty", 0))
    assert [name for name in ("a", "large", "gone", "empty") if name in copies] == ["a"]
    none = HostCopies(0)
    none.keep("a", tmp_path / "a")
    assert "a" not in none
