"""Seconds as a function of a count, by straight lines between points."""

from __future__ import annotations

import math
from bisect import bisect_right

import msgspec

__all__ = ["Curve"]


class Curve(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds at some counts. Between them lie straight lines.

    ::

        seconds │           /     Below the first point the time is that of the first point: a few
                │         /       rows wait for the same weights as one. Beyond the last point the
                │ _____/          last line goes on; a single point is a constant.
                └──────────── count

    Attributes:
        counts: [points] ascending.
        seconds: [points] at least 0.
    """

    counts: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.counts or len(self.counts) != len(self.seconds):
            raise ValueError("a curve has as many counts as seconds, and at least one")
        if any(
            after <= before for before, after in zip(self.counts, self.counts[1:], strict=False)
        ):
            raise ValueError(f"the counts of a curve ascend: {self.counts}")
        if not all(0 <= each < math.inf for each in self.seconds):
            raise ValueError(f"the seconds of a curve are at least 0: {self.seconds}")

    def __call__(self, count: float) -> float:
        """The seconds at this count."""
        counts, seconds = self.counts, self.seconds
        if count <= counts[0] or len(counts) == 1:
            return seconds[0]
        right = min(bisect_right(counts, count), len(counts) - 1)
        slope = (seconds[right] - seconds[right - 1]) / (counts[right] - counts[right - 1])
        return seconds[right - 1] + slope * (count - counts[right - 1])

    def times(self, factor: float) -> Curve:
        """The curve with all seconds multiplied."""
        return Curve(self.counts, tuple(factor * each for each in self.seconds))

    @staticmethod
    def constant(seconds: float) -> Curve:
        """The same time for every count."""
        return Curve((0.0,), (seconds,))

    @staticmethod
    def roofline(least_s: float, each_s: float) -> Curve:
        """The larger of a time for all and a time for each: ``max(least_s, count * each_s)``.

        Williams, Waterman and Patterson 2009, https://doi.org/10.1145/1498765.1498785.
        """
        if not each_s:
            return Curve.constant(least_s)
        if not least_s:
            return Curve((0.0, 1.0), (0.0, each_s))
        knee = least_s / each_s
        return Curve((knee, 2 * knee), (least_s, 2 * least_s))
