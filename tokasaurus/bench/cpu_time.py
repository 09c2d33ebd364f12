"""The CPU time of another process, and a yardstick to compare machines by."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

__all__ = ["loop_turn_ns", "machine_line", "process_cpu_s"]

_LOOP_TURNS = 300_000


def process_cpu_s(pid: int) -> float:
    """The CPU seconds of all threads of a process.

    Exact to microseconds on Linux, where each process has its own clock, and to 10 ms elsewhere.
    """
    if sys.platform == "linux":
        return time.clock_gettime((~pid << 3) | 2)  # the id that clock_getcpuclockid(3) computes
    words = ["ps", "-o", "time=", "-p", str(pid)]
    days, _, clock = subprocess.check_output(words, text=True).strip().rpartition("-")
    seconds = 0.0
    for part in clock.split(":"):
        seconds = 60 * seconds + float(part)
    return 24 * 3600 * int(days or 0) + seconds


def loop_turn_ns() -> float:
    """The nanoseconds that one turn of an empty Python loop takes now: about 20 on a quiet machine.

    A shared machine changes its speed from one minute to the next. Times that were measured at
    different values of this are not comparable.
    """
    fastest = float("inf")
    for _ in range(5):
        start = time.process_time()
        for _ in range(_LOOP_TURNS):
            pass
        fastest = min(fastest, time.process_time() - start)
    return fastest / _LOOP_TURNS * 1e9


def machine_line(turns_ns: Sequence[float]) -> str:
    """A line that states the speed of the machine, measured before and after a benchmark."""
    first, last = turns_ns
    return f"This machine: {first:.0f} ns for an empty Python loop turn, {last:.0f} ns at the end"
