"""CUDA's compiler and libraries, for FlashInfer's builds: found where it would look elsewhere.

It takes the directory above that of ``nvcc`` for CUDA's, which is wrong if the one on the PATH is a
script or a link. It links with ``libcudart.so`` and ``libcuda.so``. Where CUDA came in wheels there
is ``libcudart.so.13`` alone, and a driver alone brings ``libcuda.so.1``.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["set_cuda_home", "set_library_path"]

# What is linked with, by the names that a linker looks for.
_LIBRARIES = ("libcudart.so", "libcuda.so")

_MAPS = Path("/proc/self/maps")
_NVCC_S = 30.0


def set_cuda_home() -> None:
    """Sets CUDA_HOME in the environment of this process to what nvcc says, unless it is set.

    FlashInfer reads it as it is imported.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_NVCC_S)
    except (OSError, subprocess.TimeoutExpired):
        return
    if found := re.search(r"^#\$ _HERE_=(.+)$", done.stderr, re.MULTILINE):
        os.environ["CUDA_HOME"] = str(Path(found[1]).parent)


def set_library_path() -> None:
    """Adds what is missing for linking to LIBRARY_PATH, where compilers of this process look.

    These are links to the libraries that this process has loaded, so a device was used before.
    """
    searched = os.environ.get("LIBRARY_PATH", "")
    directories = [Path(each) for each in searched.split(os.pathsep) if each]
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        directories += [Path(home) / "lib64", Path(home) / "lib64" / "stubs"]
    loaded = _loaded()
    links = {
        name: path
        for name in _LIBRARIES
        if not any((directory / name).exists() for directory in directories)
        for path in loaded
        if path.name.startswith(f"{name}.")
    }
    if not links:
        return
    directory = tempfile.mkdtemp(prefix="tokasaurus-cuda-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    for name, path in links.items():
        (Path(directory) / name).symlink_to(path)
    os.environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, (directory, searched)))


def _loaded() -> list[Path]:
    """The files of which this process has mapped something, where the system says so."""
    if not _MAPS.exists():
        return []
    columns = (line.split(maxsplit=5) for line in _MAPS.read_text().splitlines())
    return [Path(each) for each in dict.fromkeys(part[5] for part in columns if len(part) == 6)]
