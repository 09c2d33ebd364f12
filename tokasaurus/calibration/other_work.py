"""How much other work a machine does while something is measured on it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

__all__ = ["QUIET", "OtherWork", "undisturbed"]

QUIET = 0.05
"""A share of the cores that hardly disturbs a measurement."""

_STAT = Path("/proc/stat")
# Fields of the line of all cores, behind its name: user, nice, system, irq, softirq and steal.
_BUSY = (0, 1, 2, 5, 6, 7)
_MOST_ATTEMPTS = 3  # for each measurement that is wanted

T = TypeVar("T")


class OtherWork:
    """Counts the time that cores spend on other work. Elsewhere than on Linux it sees none.

    Args:
        own_cpu_s: the CPU seconds so far of the processes that are measured.
    """

    def __init__(self, own_cpu_s: Callable[[], float] = time.process_time) -> None:
        self._own_cpu_s = own_cpu_s
        self._before = self._read()

    def share(self) -> float:
        """Of all cores' time since the last call, the share that went to other work."""
        before, self._before = self._before, self._read()
        busy_s, own_s, at = (new - old for new, old in zip(self._before, before, strict=True))
        return max(busy_s - own_s, 0.0) / (at * (os.cpu_count() or 1))

    def _read(self) -> tuple[float, float, float]:
        own_s, at = self._own_cpu_s(), time.monotonic()
        if not _STAT.exists():
            return own_s, own_s, at
        fields = _STAT.read_text().split("\n", 1)[0].split()[1:]
        ticks = sum(int(fields[index]) for index in _BUSY)
        return ticks / os.sysconf("SC_CLK_TCK"), own_s, at


def undisturbed(
    measure: Callable[[], T], count: int, work: OtherWork, progress: Callable[[str], None]
) -> tuple[list[T], float]:
    """Repeats a measurement until other work has left some alone.

    Args:
        measure: measures once.
        count: of measurements that are wanted.
        work: of the machine.
        progress: takes a line about each that was disturbed.

    Returns:
        Those that were disturbed least, in their order, and the largest share of the cores that
        went to other work during one of them. After three times as many measurements it makes do
        with what it has.
    """
    found: list[tuple[float, int, T]] = []
    for number in range(_MOST_ATTEMPTS * count):
        work.share()
        value = measure()
        found.append((work.share(), number, value))
        if found[-1][0] > QUIET:
            progress(f"other work took {found[-1][0]:.0%} of the cores meanwhile: once more")
        if sum(share <= QUIET for share, _, _ in found) == count:
            break
    best = sorted(found, key=lambda each: each[:2])[:count]
    best.sort(key=lambda each: each[1])
    return [value for _, _, value in best], max(share for share, _, _ in best)
