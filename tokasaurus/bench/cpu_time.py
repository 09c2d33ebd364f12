"""The CPU time of another process."""

from __future__ import annotations

import subprocess
import sys
import time

__all__ = ["process_cpu_s"]


def process_cpu_s(pid: int) -> float:
    """Seconds that all threads of a process have computed.

    Exact to microseconds on Linux, where every process has a clock of its own; to 10 ms elsewhere.
    """
    if sys.platform == "linux":
        return time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3) computes it like this
    words = ["ps", "-o", "time=", "-p", str(pid)]
    days, _, clock = subprocess.check_output(words, text=True).strip().rpartition("-")
    seconds = 0.0
    for part in clock.split(":"):
        seconds = 60 * seconds + float(part)
    return 24 * 3600 * int(days or 0) + seconds
