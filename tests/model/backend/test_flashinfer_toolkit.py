"""Where FlashInfer's builds find CUDA. Programs here are scripts, and libraries are empty."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tokasaurus.model.backend.flashinfer import toolkit
from tokasaurus.model.backend.flashinfer.toolkit import set_cuda_home, set_library_path


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("CUDA_HOME", "CUDA_PATH", "LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)


def add_nvcc(directory, script):
    directory.mkdir()
    (directory / "nvcc").write_text(f"#!/bin/sh\n{script}\n")
    (directory / "nvcc").chmod(0o755)


def test_cuda_is_where_nvcc_says_that_it_is(tmp_path, monkeypatch):
    """On the PATH there is a script elsewhere, which calls it."""
    add_nvcc(
        tmp_path / "bin", "echo '#$ _SPACE_= ' >&2; echo '#$ _HERE_=/opt/cuda/bin' >&2; exit 1"
    )
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    set_cuda_home()
    assert os.environ["CUDA_HOME"] == "/opt/cuda"


def test_what_the_user_says_stays(tmp_path, monkeypatch):
    add_nvcc(tmp_path / "bin", "echo '#$ _HERE_=/opt/cuda/bin' >&2")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setenv("CUDA_PATH", "/mine")
    set_cuda_home()
    assert "CUDA_HOME" not in os.environ


@pytest.mark.parametrize("script", ["echo something else >&2", "exit 127"])
def test_an_nvcc_that_says_nothing_changes_nothing(tmp_path, monkeypatch, script):
    add_nvcc(tmp_path / "bin", script)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    set_cuda_home()
    assert "CUDA_HOME" not in os.environ


def links(directory):
    """Whether a compiler can link with both libraries, in CUDA's directory or elsewhere."""
    command = ["g++", "-shared", "-x", "c++", os.devnull, "-o", str(directory / "linked.so")]
    command += [f"-L{directory / 'lib64'}", "-lcudart", "-lcuda"]
    return subprocess.run(command, capture_output=True).returncode == 0


def test_libraries_that_are_loaded_can_be_linked_with(tmp_path, monkeypatch):
    """As of wheels, and of a driver: each has the name that a program loads it by."""
    loaded = [tmp_path / "libcudart.so.13", tmp_path / "libcuda.so.580.1", tmp_path / "libc.so.6"]
    for path in loaded:
        subprocess.run(["g++", "-shared", "-x", "c++", os.devnull, "-o", str(path)], check=True)
    assert not links(tmp_path)
    monkeypatch.setattr(toolkit, "_loaded", lambda: loaded)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("LIBRARY_PATH", "/elsewhere")
    set_library_path()
    made, kept = os.environ["LIBRARY_PATH"].split(":")
    assert sorted(each.name for each in Path(made).iterdir()) == ["libcuda.so", "libcudart.so"]
    assert kept == "/elsewhere"
    assert links(tmp_path)


def test_what_cuda_has_is_left_to_it(tmp_path, monkeypatch):
    stubs = tmp_path / "lib64" / "stubs"
    stubs.mkdir(parents=True)
    (stubs / "libcuda.so").touch()
    (tmp_path / "lib64" / "libcudart.so").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    loaded = [Path("/usr/lib/libcuda.so.1"), Path("/usr/lib/libcudart.so.13")]
    monkeypatch.setattr(toolkit, "_loaded", lambda: loaded)
    set_library_path()
    assert "LIBRARY_PATH" not in os.environ


def test_the_files_that_this_process_has_loaded_are_known():
    assert any(path.name.startswith("libtorch") for path in toolkit._loaded())
    assert all(path.name for path in toolkit._loaded())
