"""The patched use of pages against a forecast that is made anew."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokasaurus.manager.forecast.curve import ForecastRows, Forest
from tokasaurus.manager.forecast.use_curve import UseCurve
from tokasaurus.rounding import ceil_div

PAGE_SIZE = 4


@dataclass
class Sequences:
    """Decoding sequences, at the step in which they are looked at."""

    length: np.ndarray
    num_steps: np.ndarray

    @classmethod
    def random(cls, chance: np.random.Generator, count: int) -> Sequences:
        return cls(chance.integers(1, 30, count), chance.integers(1, 40, count))

    def later(self, num_steps: int) -> Sequences:
        """Those that have not ended after ``num_steps`` steps."""
        is_left = self.num_steps >= num_steps
        return Sequences((self.length + num_steps)[is_left], (self.num_steps - num_steps)[is_left])

    def part(self, chosen: np.ndarray) -> Sequences:
        return Sequences(self.length[chosen], self.num_steps[chosen])

    def beside(self, other: Sequences) -> Sequences:
        return Sequences(
            np.append(self.length, other.length), np.append(self.num_steps, other.num_steps)
        )

    def rows(self) -> ForecastRows:
        nothing = np.zeros(len(self.length), np.int64)
        num_pages = ceil_div(self.length, PAGE_SIZE)
        return ForecastRows(self.length, num_pages, nothing, self.num_steps, nothing - 1)


def pages(use: np.ndarray) -> list[int]:
    return np.trim_zeros(use, "b").tolist()


def test_the_patched_curve_is_that_of_a_new_forecast() -> None:
    for seed in range(50):
        chance = np.random.default_rng(seed)
        curve = UseCurve(PAGE_SIZE, prefill_rate=10)
        running = Sequences.random(chance, 6)
        step = 100
        curve.renew(curve.forecast(running.rows()).use(), step)
        for _ in range(chance.integers(1, 6)):
            num_steps = int(chance.integers(0, 8))
            running, step = running.later(num_steps), step + num_steps
            stays = chance.random(len(running.length)) < 0.7
            curve.remove(running.part(~stays).rows(), step)
            admitted = Sequences.random(chance, int(chance.integers(0, 4)))
            curve.add(admitted.rows(), Forest.none(), 0, step)
            running = running.part(stays).beside(admitted)
            if chance.random() < 0.5:
                curve.bring_up_to_date(step)
        curve.bring_up_to_date(step)
        anew = curve.forecast(running.rows()).use()
        assert pages(curve.coming(step)) == pages(anew), f"seed {seed}"
        assert curve.most_used == anew.max(initial=0), f"seed {seed}"


def test_the_bound_grows_with_admitted_sequences() -> None:
    curve = UseCurve(PAGE_SIZE, prefill_rate=10)
    one = Sequences(np.array([3]), np.array([6]))  # 9 positions in the end
    curve.add(one.rows(), Forest.none(), 0, 0)
    assert curve.most_used == 3
    curve.remove(one.rows(), 0)
    assert curve.most_used == 3
    curve.bring_up_to_date(0)
    assert curve.most_used == 0


def test_a_curve_that_has_passed_is_empty() -> None:
    curve = UseCurve(PAGE_SIZE, prefill_rate=10)
    curve.renew(np.array([2, 1]), 7)
    assert curve.coming(8).tolist() == [1]
    assert curve.coming(9).tolist() == curve.coming(500).tolist() == [0]
