"""CPU time: of another process, and of a yardstick to compare machines by."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

__all__ = ["loop_turn_ns", "machine_line", "process_cpu_s"]

_LOOP_TURNS = 300_000


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


def loop_turn_ns() -> float:
    """Nanoseconds of an empty turn of a Python loop, now; about 20 on a current machine left to itself.

    Machines shared with others change their speed from one minute to the next: times taken at different
    values of this are not comparable.
    """
    fastest = float("inf")
    for _ in range(5):
        start = time.process_time()
        for _ in range(_LOOP_TURNS):
            pass
        fastest = min(fastest, time.process_time() - start)
    return fastest / _LOOP_TURNS * 1e9


def machine_line(turns_ns: Sequence[float]) -> str:
    """What a table says of the machine, whose speed was taken before and after."""
    first, last = turns_ns
    return f"This machine: {first:.0f} ns for an empty Python loop turn, {last:.0f} ns at the end"
