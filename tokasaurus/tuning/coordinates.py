"""Search along one coordinate after the other, by measurements. Knows no engine.

A point is a setting of flags. From the best point so far, the search tries the neighbours along
each coordinate, and walks on in a direction that is faster. It ends when no coordinate helps, or
when the caller's budget does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["Coordinate", "Point", "climb", "key_of"]

Point: TypeAlias = Mapping[str, Any]
"""Values of flags by name."""

Measure: TypeAlias = Callable[[Point], float | None]
"""The tokens per second of a point, 0 if it does not run; None if the budget is spent."""


@dataclass(frozen=True)
class Coordinate:
    """What can be changed.

    Attributes:
        options: values of one flag or several that go together.
        ordered: whether neighbours are alike, so that the search walks; otherwise it tries all.
    """

    options: Sequence[Point]
    ordered: bool = True

    def index(self, point: Point) -> int | None:
        """The option that a point has; None if it has another value."""
        return next(
            (at for at, option in enumerate(self.options) if {**point, **option} == dict(point)),
            None,
        )

    def walks(self, point: Point) -> list[Sequence[Point]]:
        """Options to try from a point: rows of options, each as long as it gets faster."""
        at = self.index(point)
        if not self.ordered or at is None:
            return [[option] for index, option in enumerate(self.options) if index != at]
        return [self.options[at + 1 :], self.options[:at][::-1]]


def key_of(point: Point) -> tuple[tuple[str, Any], ...]:
    """The same for the same values in any order."""
    return tuple(sorted(point.items()))


def climb(
    start: Point, coordinates: Sequence[Coordinate], measure: Measure, gain: float
) -> tuple[Point, bool]:
    """The best point that is found.

    Args:
        start: where the search begins.
        coordinates: in the order in which they are tried.
        measure: is asked once for each point.
        gain: a point is better if it is faster by this factor.

    Returns:
        The point, and whether the search ended by itself.
    """
    rates: dict[tuple[tuple[str, Any], ...], float] = {}

    def rate_of(point: Point) -> float | None:
        key = key_of(point)
        if key not in rates:
            rate = measure(point)
            if rate is None:
                return None
            rates[key] = rate
        return rates[key]

    best, best_rate = start, rate_of(start)
    if best_rate is None:
        return start, False
    turn = num_idle = 0  # idle: coordinates in a row that did not help
    while num_idle < len(coordinates):
        before, coordinate = best, coordinates[turn % len(coordinates)]
        for walk in coordinate.walks(before):
            for option in walk:
                point = {**best, **option}
                rate = rate_of(point)
                if rate is None:
                    return best, False
                if rate <= gain * best_rate:
                    break
                best, best_rate = point, rate
            if best is not before and coordinate.ordered:
                break  # the other way is slower
        turn += 1
        num_idle = num_idle + 1 if best is before else 0
    return best, True
