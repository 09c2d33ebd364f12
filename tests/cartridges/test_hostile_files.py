"""Files that are no cartridges get an error that says why; nothing in them runs.

Most of them are judged by the reader in this process, since a process for each takes seconds. Those
that only limits stop, and one of each kind, go through the process that reads them in earnest; the
long tests send all.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from pathlib import Path

import pytest
import torch
from cartridge_files import fields, own_tensors, read_here
from hostile_files import CASES, DOUBLING, KINDS, Case
from rows import check_each
from safetensors.torch import save_file

from tokasaurus.cartridges import reading
from tokasaurus.cartridges.reading import ReadLimits, read_cartridge
from tokasaurus.errors import RequestError

_LIMITS = ReadLimits(timeout_s=20)


def make(case: Case, directory: Path) -> tuple[Path, Path | None]:
    directory = directory / re.sub(r"\W", "_", case.name)
    directory.mkdir()
    case.make(directory)
    companion = directory / "config.yaml"
    return directory / "file", companion if companion.exists() else None


def check_in_process(case: Case, directory: Path) -> None:
    """Reads a file in earnest: it is refused, and nothing of it is left."""
    source, companion = make(case, directory)
    before = sorted(source.parent.iterdir())
    target = source.parent / "target"
    with pytest.raises(RequestError, match=case.says) as caught:
        asyncio.run(read_cartridge(source, target, _LIMITS, companion))
    assert caught.value.field == "cartridges"
    assert caught.value.message.isprintable()
    assert len(caught.value.message) <= 1100
    assert sorted(source.parent.iterdir()) == before


def test_a_file_that_is_no_cartridge_is_refused_with_the_reason(tmp_path):
    cases = [case for case in CASES if not case.needs_limits]
    assert len(cases) > 60

    def check(case):
        source, companion = make(case, tmp_path)
        report = read_here(source, companion=companion, limits=_LIMITS)
        assert report.metadata is None
        said = report.refusal or ""
        assert re.search(case.says, said), said
        assert str(source) not in said
        assert not (source.parent / "marker").exists()

    check_each(cases, check)


def test_yaml_that_doubles_with_each_line_is_refused_or_does_not_double(tmp_path):
    source, companion = make(DOUBLING, tmp_path)
    report = read_here(source, companion=companion, limits=_LIMITS)
    assert report.metadata is not None or re.search(DOUBLING.says, report.refusal)


def test_the_process_that_reads_refuses_hostile_files_and_leaves_nothing(tmp_path):
    cases = [KINDS[kind][0] for kind in ("programs", "damage", "companions")]
    cases += [case for case in CASES if case.needs_limits]
    check_each(cases, lambda case: check_in_process(case, tmp_path))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_the_process_that_reads_refuses_every_hostile_file(kind, tmp_path):
    check_each(KINDS[kind], lambda case: check_in_process(case, tmp_path))


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    torch.save(fields(), tmp_path / "file")
    rows = [
        (tmp_path / "missing", None, "the file cannot be opened: No such file"),
        (tmp_path, None, "the file is not a regular file"),
        (tmp_path / "pipe", None, "the file is not a regular file"),
        (Path("/dev/zero"), None, "the file is not a regular file"),
        (tmp_path / "loop", None, "the file cannot be opened: Too many levels"),
        (tmp_path / "a\0b", None, "the file cannot be opened: embedded null"),
        (tmp_path / "file", tmp_path / "pipe", "its config.yaml is not a regular file"),
    ]

    def check(row):
        source, companion, says = row
        with pytest.raises(RequestError, match=says):
            asyncio.run(read_cartridge(source, tmp_path / "target", _LIMITS, companion))

    check_each(rows, check)


def test_a_file_above_a_limit_is_refused(tmp_path):
    save_file(own_tensors(), tmp_path / "file")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 27)
    rows = [
        ("file", ReadLimits(max_tokens=4), "the file has 5 positions; the limit is 4"),
        ("file", ReadLimits(max_bytes=319), "its tensors have 320 bytes; the limit is 319"),
        ("large", ReadLimits(max_bytes=1000), "the file has 134217728 bytes; the limit is"),
        ("file", ReadLimits(timeout_s=0.01), "to read the file took longer than 0.01 s"),
    ]

    def check(row):
        name, limits, says = row
        with pytest.raises(RequestError, match=says):
            asyncio.run(read_cartridge(tmp_path / name, tmp_path / "target", limits))
        assert not (tmp_path / "target").exists()

    check_each(rows, check)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    save_file(own_tensors(), tmp_path / "file")

    async def run():
        task = asyncio.create_task(read_cartridge(tmp_path / "file", tmp_path / "target"))
        await asyncio.sleep(0)
        os.utime(tmp_path / "file", (1, 1))
        with pytest.raises(RequestError, match="has changed while it was read; write a new ver"):
            await task

    asyncio.run(run())
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_reading_process_that_breaks_off_is_a_refusal(tmp_path, monkeypatch):
    torch.save(fields(), tmp_path / "file")
    (tmp_path / "broken.py").write_text(
        "import os, signal, sys\n"
        "name = open('NAME').read()\n"
        "sys.stdout.write('{}')\n"
        "sys.stdout.flush()\n"
        "os.kill(os.getpid(), signal.Signals[name]) if name else None\n".replace(
            "NAME", str(tmp_path / "name")
        )
    )
    monkeypatch.setenv("PYTHONPATH", f"{os.environ.get('PYTHONPATH', '')}:{tmp_path}")
    monkeypatch.setattr(reading, "_PROGRAM", "broken")
    rows = [
        ("SIGSEGV", "broke off, so it is probably damaged"),
        ("SIGBUS", "has changed while it was read"),
        ("SIGXCPU", "took longer than"),
        ("SIGKILL", "the system has ended the process"),
        ("", "the file cannot be read"),
    ]

    def check(row):
        name, says = row
        (tmp_path / "name").write_text(name)
        with pytest.raises(RequestError, match=says):
            asyncio.run(read_cartridge(tmp_path / "file", tmp_path / "target"))

    check_each(rows, check)


def test_a_cancelled_reading_ends_its_process(tmp_path, monkeypatch):
    torch.save(fields(), tmp_path / "file")
    started = tmp_path / "started"
    (tmp_path / "sleeper.py").write_text(
        f"import os, time\nopen({str(started)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{os.environ.get('PYTHONPATH', '')}:{tmp_path}")
    monkeypatch.setattr(reading, "_PROGRAM", "sleeper")

    async def run():
        task = asyncio.create_task(read_cartridge(tmp_path / "file", tmp_path / "target"))
        until = time.monotonic() + 30
        while not (started.exists() and started.read_text()):
            assert time.monotonic() < until
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    assert not [each for each in tmp_path.iterdir() if each.suffix == ".part"]
