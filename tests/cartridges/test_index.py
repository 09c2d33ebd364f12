"""Names and versions in a directory that several processes share, and that may be killed."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tokasaurus.cartridges import index as index_module
from tokasaurus.cartridges.index import Index, NameRecord
from tokasaurus.cartridges.specification import CartridgeMetadata, ModelShape

# Takes and changes names at random, and says so if a version that it uses is gone or another one.
PROGRAM = """
import random, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_index import commit
from tokasaurus.cartridges.index import Index

index = Index(Path(sys.argv[1]), 20 * 100)
rng = random.Random(int(sys.argv[2]))
used = []
end = time.monotonic() + float(sys.argv[3])
print("begun", flush=True)
while time.monotonic() < end:
    name, action = f"name{{rng.randrange(6)}}", rng.random()
    key = index.key("local", name)
    if action < 0.3:
        try:
            commit(index, name, f"{{rng.randrange(60):064d}}", rng.random() / 50)
        except ValueError:
            pass  # all that is stored is in use
    elif action < 0.4:
        index.remove(key)
    elif action < 0.65:
        record = index.find(key)
        if record is not None and index.pin(record.metadata.digest):
            used.append(record.metadata.digest)
    elif used:
        index.unpin(used.pop(rng.randrange(len(used))))
    for digest in used:
        assert index.path(digest).read_text() == digest * 2, digest
    time.sleep(rng.random() / 500)
print("done", flush=True)
"""


def record_of(name: str, digest: str) -> NameRecord:
    metadata = CartridgeMetadata(digest, 1, 0, ModelShape(1, 1, 1), "F32", 8)
    return NameRecord("local", name, Index.key("local", name), "1", metadata, 128, time.time())


def commit(
    index: Index, name: str, digest: str, pause_s: float = 0.0, *, is_named: bool = True
) -> None:
    with index.incoming() as directory:
        (directory / "read").write_text(digest * 2)
        time.sleep(pause_s)
        index.commit(record_of(name, digest), directory / "read", is_named=is_named)


def digests(directory: Path) -> set[str]:
    return {path.name.removesuffix(".safetensors") for path in (directory / "versions").iterdir()}


def test_a_version_stays_while_a_name_or_a_pin_has_it(tmp_path):
    index = Index(tmp_path, None)
    commit(index, "a", "1")
    commit(index, "b", "1")
    commit(index, "a", "2")
    assert digests(tmp_path) == {"1", "2"}
    assert index.pin("1")
    assert index.pin("1")
    index.remove(index.key("local", "b"))
    assert digests(tmp_path) == {"1", "2"}
    assert index.has_leftovers
    assert not index.unpin("1")
    assert index.unpin("1")
    index.drop_unnamed()
    assert digests(tmp_path) == {"2"}
    assert not index.has_leftovers
    assert not index.pin("1")
    with pytest.raises(ValueError, match="not in use"):
        index.unpin("1")


def test_the_use_of_a_version_does_not_look_like_a_change_of_its_file(tmp_path):
    """A worker may be reading it, and refuses a file that was written to meanwhile."""
    index = Index(tmp_path, None)
    commit(index, "a", "1")
    before = index.path("1").stat()
    time.sleep(0.02)
    assert index.pin("1")
    commit(index, "b", "1")
    after = index.path("1").stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert after.st_atime_ns > before.st_atime_ns


def test_a_name_that_means_another_version_by_now_is_not_removed(tmp_path):
    index = Index(tmp_path, None)
    key = index.key("local", "a")
    commit(index, "a", "1")
    index.remove(key, "2")
    assert index.find(key) is not None
    index.remove(key, "1")
    assert index.find(key) is None


def test_a_version_without_a_name_can_be_committed(tmp_path):
    index = Index(tmp_path, None)
    commit(index, "a", "1")
    commit(index, "a", "2", is_named=False)
    found = index.find(index.key("local", "a"))
    assert found is not None
    assert found.metadata.digest == "1"
    assert index.pin("2")


def test_a_version_that_is_deleted_while_it_is_pinned_is_not_there(tmp_path, monkeypatch):
    index = Index(tmp_path, None)
    commit(index, "a", "1")

    def locking(file, operation):
        index.path("1").unlink()  # another process was faster

    monkeypatch.setattr(index_module.fcntl, "flock", locking)
    assert not index.pin("1")


def test_processes_that_share_a_directory_find_what_they_use(tmp_path):
    """Three at a time, of which some are killed."""
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    rng = random.Random(3)

    def start(number: int, seconds: float) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-c", program, str(tmp_path), str(number), str(seconds)]
        return subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    survivors = [start(number, 3.0) for number in range(2)]
    for number in range(2, 5):
        victim = start(number, 60.0)
        assert victim.stdout is not None
        assert victim.stdout.readline() == "begun\n"
        time.sleep(rng.random() / 2)
        victim.kill()
        victim.communicate()
    for each in survivors:
        output, errors = each.communicate()
        assert output == "begun\ndone\n", errors
    # The next one finds the directory whole.
    index = Index(tmp_path, None)
    commit(index, "last", "9" * 64)
    named = {record.metadata.digest for record in index.records()}
    assert digests(tmp_path) == named
    for digest in named:
        assert index.path(digest).read_text() == digest * 2
    assert not [*(tmp_path / "incoming").iterdir()]
