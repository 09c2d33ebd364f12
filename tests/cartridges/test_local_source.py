"""Files of this machine: which of them an id is, and which no request gets."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import threading
from pathlib import Path

import pytest
from fetching import fetch, refusal
from rows import check_each

from tokasaurus.cartridges.sources import local as local_module
from tokasaurus.cartridges.sources.local import LocalSource


class World:
    """A cartridge directory, another root, and files outside of both."""

    def __init__(self, path: Path) -> None:
        self.named, self.root, self.outside = path / "named", path / "root", path / "outside"
        self.targets = path / "targets"
        for each in (self.named, self.root, self.outside, self.targets):
            each.mkdir()
        own = self.named / ".store"
        own.mkdir()
        self.source = LocalSource(self.named, [self.named, self.root], own, max_bytes=1000)

    def fetch(self, cartridge_id):
        return asyncio.run(fetch(self.source, str(cartridge_id), self.targets))

    def refusal(self, cartridge_id):
        return asyncio.run(refusal(self.source, str(cartridge_id), self.targets))

    def version(self, cartridge_id):
        return asyncio.run(self.source.find(str(cartridge_id))).version


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def write(path, data=b"data"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_an_id_is_a_path_or_a_name(world):
    write(world.root / "cartridge.pt", b"path")
    write(world.named / "plain", b"plain")
    write(world.named / "a.pt", b"trained")
    write(world.named / "b.safetensors", b"ours")
    write(world.named / "run" / "cache-step10.pt", b"10")
    write(world.named / "run" / "cache-step9.pt", b"9")
    write(world.named / "run" / "config.yaml", b"model: {}")
    write(world.named / "x" / "y.pt", b"deep")

    def check(row):
        cartridge_id, data, companion = row
        got = world.fetch(cartridge_id)
        assert (got.data, got.companion) == (data, companion)
        assert got.version == got.found_version
        assert got.num_bytes == len(data)

    rows = [
        (world.root / "cartridge.pt", b"path", None),
        ("plain", b"plain", None),
        ("a", b"trained", None),
        ("a.pt", b"trained", None),
        ("b", b"ours", None),
        ("run", b"10", b"model: {}"),
        (world.named / "run", b"10", b"model: {}"),
        ("run/cache-step9.pt", b"9", b"model: {}"),
        ("x/y", b"deep", None),
        ("x/../a.pt", b"trained", None),
    ]
    check_each(rows, check)


def test_the_companion_of_a_root_is_of_something_else(world):
    write(world.root / "config.yaml", b"unrelated: 1")
    write(world.root / "cartridge.pt")
    assert world.fetch(world.root / "cartridge.pt").companion is None


def test_links_within_the_roots_are_followed(world):
    write(world.root / "real.pt", b"real")
    (world.named / "link.pt").symlink_to(world.root / "real.pt")
    (world.named / "tree").symlink_to(world.root)
    assert world.fetch("link.pt").data == b"real"
    assert world.fetch("tree/real.pt").data == b"real"


def test_what_is_outside_of_the_roots_is_refused_whether_it_exists_or_not(world):
    secret = write(world.outside / "secret.pt", b"secret")
    (world.named / "link.pt").symlink_to(secret)
    (world.named / "tree").symlink_to(world.outside)
    (world.named / "missing.pt").symlink_to(world.outside / "nothing.pt")
    (world.named / "chain.pt").symlink_to(world.named / "link.pt")
    run = world.named / "run"
    write(run / "other.txt")
    (run / "cartridge.pt").symlink_to(secret)
    (world.named / "pair").mkdir()
    write(world.named / "pair" / "cartridge.pt")
    (world.named / "pair" / "config.yaml").symlink_to(secret)
    write(world.named / ".store" / "names" / "x.pt")

    def check(cartridge_id):
        message = world.refusal(cartridge_id)
        assert "is not within the directories that cartridges may come from" in message
        assert "cartridge_roots" in message

    check_each(
        [
            secret,
            world.outside / "nothing.pt",
            world.outside,
            "/etc/passwd",
            "/proc/self/environ",
            "/",
            "../outside/secret.pt",
            "../../../../../../etc/passwd",
            "x/../../outside/secret.pt",
            world.root / ".." / "outside" / "secret.pt",
            str(world.root) + "2/a.pt",
            "link.pt",
            "tree/secret.pt",
            "missing.pt",
            "chain.pt",
            "run",
            "pair",
            ".store/names/x.pt",
        ],
        check,
    )


def test_what_is_no_file_is_refused(world):
    os.mkfifo(world.named / "pipe.pt")
    door = socket.socket(socket.AF_UNIX)
    door.bind(os.path.relpath(world.named / "door.pt"))
    door.close()
    (world.named / "loop.pt").symlink_to(world.named / "loop.pt")
    (world.named / "empty").mkdir()
    write(world.named / "two" / "a.pt")
    write(world.named / "two" / "b.pt")
    write(world.named / "large.pt", bytes(1001))

    def check(row):
        cartridge_id, message = row
        assert re.search(message, world.refusal(cartridge_id))

    rows = [
        ("pipe.pt", "is not a regular file"),
        ("door.pt", "is not a regular file"),
        ("/dev/zero", "is not within"),
        ("loop.pt", "cannot be resolved|no such file"),
        ("empty", "no file there ends in .pt or .safetensors; it has no files"),
        ("two", "several files, a.pt, b.pt; name one of them"),
        ("nothing", r"no such file.*looked for .*/nothing, .*nothing.safetensors, .*nothing.pt"),
        (world.root / "nothing.pt", "no such file"),
        ("a" * 300, "cannot be read|no such file"),
        ("large.pt", "1001 bytes, and max_cartridge_bytes=1000"),
        ("pipe.pt/x", "no such file"),
    ]
    check_each(rows, check)


def test_a_link_that_changes_after_the_look_is_refused(world, monkeypatch):
    """The directory of the file is a link to elsewhere while it is opened, or from then on."""
    run, aside = world.named / "run", world.named / "aside"
    opened, copied = os.open, local_module._copy_bytes
    is_lasting = False

    def opening(path, *args, **options):
        if Path(path).name == "c.pt" and not run.is_symlink():
            run.rename(aside)
            run.symlink_to(world.outside)
        return opened(path, *args, **options)

    def copying(*args):
        if not is_lasting:
            run.unlink()
            aside.rename(run)
        return copied(*args)

    monkeypatch.setattr(local_module.os, "open", opening)
    monkeypatch.setattr(local_module, "_copy_bytes", copying)
    write(world.outside / "c.pt", b"secret")
    write(run / "c.pt", b"ours")
    assert "is not within the directories" in world.refusal("run/c.pt")
    run.unlink()
    aside.rename(run)
    is_lasting = True
    assert "is not within the directories" in world.refusal("run/c.pt")


def test_a_change_of_the_file_changes_the_version(world):
    path = write(world.named / "a.pt", b"1")
    versions = [world.version("a.pt")]
    assert world.version("a.pt") == versions[0]
    stamp = path.stat()
    # The same length, and the same time of modification.
    write(world.named / "b.pt", b"2").rename(path)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    versions.append(world.version("a.pt"))
    path.write_bytes(b"33")
    versions.append(world.version("a.pt"))
    write(world.named / "run" / "c.pt")
    versions.append(world.version("run"))
    write(world.named / "run" / "config.yaml")
    versions.append(world.version("run"))
    assert len(set(versions)) == len(versions)


def test_a_file_is_copied_only_once_a_further_change_would_be_seen(world, monkeypatch):
    """What is written twice within one tick of a file system's clock has one version."""

    def coarse_version(place):
        return f"{place.path.stat().st_ctime_ns // 20_000_000}"

    monkeypatch.setattr(local_module, "_version", coarse_version)
    path = world.named / "a.pt"
    for number in range(5):
        path.write_bytes(b"%03d" % number)
        got = world.fetch("a.pt")
        path.write_bytes(b"%03d" % (number + 500))
        assert (got.version == world.version("a.pt")) == (got.data == path.read_bytes())


def test_a_file_that_is_written_all_the_time_is_not_taken_in_halves(world, monkeypatch):
    monkeypatch.setattr(local_module, "_PATIENCE_S", 0.2)
    path, end = write(world.named / "a.pt", bytes(100)), threading.Event()

    def writing():
        number = 0
        while not end.is_set():
            number = (number + 1) % 256
            path.write_bytes(bytes([number]) * 500)

    thread = threading.Thread(target=writing)
    thread.start()
    try:
        for _ in range(5):
            try:
                data = world.fetch("a.pt").data
            except Exception as error:
                assert "changes while it is read" in str(error)  # noqa: PT017
            else:
                # Empty, if the writer paused after it had emptied the file.
                assert len(set(data)) <= 1
    finally:
        end.set()
        thread.join()
