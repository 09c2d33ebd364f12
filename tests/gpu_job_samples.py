"""Jobs for the tests of ``gpu_jobs``, which import little."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tokasaurus.errors import ConfigError

__all__ = ["aborts", "hangs", "refuses", "sums"]


def sums(number: int) -> tuple[str, list[str]]:
    """Returns what a job of kernels returns, of which 1 is right."""
    return str(number), [] if number == 1 else [f"{number} differs"]


def aborts() -> None:
    print("before the end", flush=True)
    os.abort()


def hangs(path: Path) -> None:
    """Writes its process id first."""
    path.write_text(str(os.getpid()))
    time.sleep(600)


def refuses() -> None:
    raise ConfigError("attention=triton: Triton is not installed")
