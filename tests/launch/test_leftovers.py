"""Private directories of engines that were killed go at the next start; others stay."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tokasaurus.config.parser import parse_command_line
from tokasaurus.launch.assemble import assemble
from tokasaurus.launch.leftovers import own_directory, sweep
from tokasaurus.launch.supervisor import Supervisor

OWN = """
import sys, time
from tokasaurus.launch.leftovers import own_directory
directory, file = own_directory()
print(directory, flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def test_a_killed_owner_loses_its_directory_and_a_living_one_keeps_it():
    process = subprocess.Popen([sys.executable, "-c", OWN], stdout=subprocess.PIPE, text=True)
    try:
        directory = Path(process.stdout.readline().strip())
        (directory / "sockets").mkdir()
        (directory / "sockets" / "manager").touch()
        own, file = own_directory()
        assert Path(own).stat().st_mode & 0o777 == 0o700
        sweep()
        assert (directory / "sockets" / "manager").exists()
        assert Path(own).exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    sweep()
    assert not directory.exists()
    assert Path(own).exists()
    file.close()
    sweep()
    assert not Path(own).exists()


def test_only_directories_of_engines_are_deleted(tmp_path, monkeypatch):
    real, _ = own_directory()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "owner").touch()
    (tmp_path / "tokasaurus-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tokasaurus-of-another-program").mkdir()
    (tmp_path / "tokasaurus-file").touch()
    odd = tmp_path / "tokasaurus-odd"
    odd.mkdir()
    (odd / "owner").symlink_to(tmp_path / "elsewhere" / "owner")
    foreign, file = own_directory()
    file.close()
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 4242)
        sweep()
    assert sorted(tmp_path.rglob("*")) == before
    sweep()
    assert not Path(foreign).exists()
    assert all(each.exists() for each in before if foreign not in str(each))
    assert Path(real).exists()


def test_an_engine_sweeps_when_it_starts(tmp_path):
    _, file = own_directory()
    file.close()
    (old,) = tmp_path.iterdir()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        supervisor = Supervisor(assemble(parse_command_line([], {})), listener)
        (new,) = tmp_path.iterdir()
        assert new != old
        sweep()
        assert new.exists()
        supervisor._members.end_all()
    assert not list(tmp_path.iterdir())
