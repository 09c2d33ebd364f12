"""The forecast against a simulation that follows its model step by step, page by page."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest

from tokasaurus.manager.forecast.curve import Forecast, ForecastRows, Forest
from tokasaurus.manager.kv.shared_prefixes import SharedPrefixes
from tokasaurus.rounding import ceil_div

# length, num_pages, num_prompt_tokens, num_steps, leaf
Row = tuple[int, int, int, int, int]
_new_page = itertools.count().__next__


@dataclass
class State:
    page_size: int = 4
    rate: int = 8
    running: list[Row] = field(default_factory=list)
    waiting: list[Row] = field(default_factory=list)
    nodes: list[tuple[int, int]] = field(default_factory=list)  # parent, num_pages

    def forecast(self) -> Forecast:
        return Forecast(
            columns(self.running),
            columns(self.waiting),
            Forest(
                np.array([parent for parent, _ in self.nodes], np.int32),
                np.array([len(self.path(i)) for i in range(len(self.nodes))], np.int32),
            ),
            page_size=self.page_size,
            prefill_rate=self.rate,
        )

    def path(self, node: int) -> set[tuple[int, int]]:
        """The pages of a node and of its ancestors."""
        pages = set()
        while node >= 0:
            parent, num_pages = self.nodes[node]
            pages |= {(node, i) for i in range(num_pages)}
            node = parent
        return pages


def columns(rows: list[Row]) -> ForecastRows:
    return ForecastRows(*np.array(rows, np.int64).reshape(-1, 5).T)


class Simulated:
    def __init__(self, row: Row, state: State) -> None:
        self.length, num_pages, self.to_feed, self.to_decode, leaf = row
        self.pages: set = state.path(leaf)
        while len(self.pages) < num_pages:
            self.pages.add(_new_page())
        self.end = 0

    def decode(self, page_size: int) -> None:
        if self.length == len(self.pages) * page_size:
            self.pages.add(_new_page())
        self.length += 1
        self.to_decode -= 1


def simulate(state: State, num_admitted: int) -> tuple[list[int], list[int]]:
    """Use at step 0, 1, .. and the step in which each sequence ends."""
    sequences = [Simulated(row, state) for row in state.running + state.waiting[:num_admitted]]
    left = sequences
    use: list[int] = []
    while left:
        step = len(use)
        if step:
            budget = state.rate
            for sequence in left:
                if sequence.to_feed:
                    num_fed = min(budget, sequence.to_feed)
                    sequence.to_feed -= num_fed
                    budget -= num_fed
                else:
                    sequence.decode(state.page_size)
        use.append(len(set().union(*(sequence.pages for sequence in left))))
        for sequence in left:
            sequence.end = step
        left = [sequence for sequence in left if sequence.to_feed or sequence.to_decode]
    return use, [sequence.end for sequence in sequences]


def random_state(rng: np.random.Generator) -> State:
    state = State(page_size=int(rng.integers(1, 17)), rate=int(rng.integers(1, 40)))
    size = state.page_size
    for node in range(rng.integers(0, 9)):
        parent = int(rng.integers(max(-1, node - 3), node))
        state.nodes.append((parent, int(rng.integers(1, 4))))
    # The numbers of nodes say nothing about ancestors.
    number = rng.permutation(len(state.nodes)).tolist()
    nodes = list(state.nodes)
    for old, (parent, num_pages) in enumerate(nodes):
        state.nodes[number[old]] = (-1 if parent < 0 else number[parent], num_pages)

    def random_row(is_waiting: bool) -> Row:
        leaf = int(rng.integers(-1, len(state.nodes)))
        num_shared = len(state.path(leaf))
        length = num_shared * size + int(rng.integers(1, 4 * size))
        num_steps = int(rng.integers(0, 30))
        num_pages = ceil_div(length, size)
        if is_waiting or rng.random() < 0.3:
            num_to_feed = int(rng.integers(1, length - num_shared * size + 1))
            return length, num_pages, num_to_feed, num_steps, leaf
        return length, num_pages + int(rng.integers(0, 3) == 0), 0, num_steps, leaf

    state.running = [random_row(False) for _ in range(rng.integers(0, 8))]
    state.waiting = [random_row(True) for _ in range(rng.integers(0, 8))]
    return state


def check(seed: int) -> None:
    rng = np.random.default_rng(seed)
    state = random_state(rng)
    forecast = state.forecast()
    num_waiting = len(state.waiting)
    peaks = []
    simulated = [simulate(state, count) for count in range(num_waiting + 1)]
    for num_admitted, (use, _) in enumerate(simulated):
        assert forecast.use(num_admitted).tolist() == use
        assert forecast.peak(num_admitted) == max(use, default=0)
        peaks.append(max(use, default=0))
    assert peaks == sorted(peaks)
    limits = {0, peaks[0] - 1, *peaks, *rng.integers(0, peaks[-1] + 3, 3).tolist()}
    for limit in limits:
        num_fitting = sum(peak <= limit for peak in peaks[1:])
        assert forecast.num_admissible(limit) == (num_fitting if peaks[0] <= limit else 0)
        running_end, waiting_end = forecast.finish_steps(limit)
        num_admitted = forecast.num_admissible(limit)
        ends = running_end.tolist() + waiting_end[:num_admitted].tolist()
        assert ends == simulated[num_admitted][1]
        assert len(waiting_end) == num_waiting


def test_forecasts_equal_a_simulation_step_by_step():
    for seed in range(320):
        check(seed)


def test_the_most_of_many_sequences_that_fit_are_admissible():
    """There bounds and cuts have something to do."""
    for seed in range(10):
        check_many_sequences(seed)


def check_many_sequences(seed: int) -> None:
    rng = np.random.default_rng(seed)
    nodes = [(int(rng.integers(-1, node)) if node else -1, 2) for node in range(30)]
    state = State(
        page_size=int(rng.choice([1, 3, 16])), rate=int(rng.choice([7, 500])), nodes=nodes
    )

    def random_row(num_to_feed: int) -> Row:
        leaf = int(rng.integers(-1, 30)) if seed % 2 else -1
        length = len(state.path(leaf)) * state.page_size + int(rng.integers(num_to_feed, 60)) + 1
        return (
            length,
            ceil_div(length, state.page_size),
            num_to_feed,
            int(rng.integers(0, 400)),
            leaf,
        )

    state.running = [random_row(int(rng.integers(0, 2))) for _ in range(200)]
    state.waiting = [random_row(int(rng.integers(1, 50))) for _ in range(300)]
    forecast = state.forecast()
    peaks = [forecast.peak(count) for count in range(301)]
    assert peaks == sorted(peaks)
    for limit in rng.integers(peaks[0], peaks[-1] + 10, 30).tolist():
        assert forecast.num_admissible(limit) == sum(peak <= limit for peak in peaks) - 1


@pytest.mark.long
def test_ten_thousand_forecasts_equal_a_simulation():
    for seed in range(1000, 11_000):
        check(seed)


def test_use_is_as_in_the_picture_of_the_module():
    assert State(running=[(6, 2, 0, 5, -1)]).forecast().use().tolist() == [2, 2, 2, 3, 3, 3]


def test_a_forecast_without_sequences():
    forecast = State().forecast()
    assert forecast.use().tolist() == []
    assert forecast.peak() == 0
    assert forecast.num_admissible(0) == forecast.num_admissible(10) == 0
    assert [len(ends) for ends in forecast.finish_steps(10)] == [0, 0]
    assert forecast.prefill_pace(10, 100, 16) == 0
    none = ForecastRows.none()
    assert Forecast(none, none, Forest.none(), page_size=1, prefill_rate=1).peak() == 0


def test_a_forecast_without_running_sequences():
    state = State(waiting=[(5, 2, 5, 3, -1)] * 3)
    forecast = state.forecast()
    assert [forecast.num_admissible(limit) for limit in (0, 1, 2, 4, 6, 100)] == [0, 0, 1, 2, 3, 3]
    assert forecast.prefill_pace(100, 64, 16) == 64


def test_a_sequence_larger_than_the_cache_is_not_admissible():
    state = State(waiting=[(100, 25, 100, 50, -1), (4, 1, 4, 1, -1)])
    forecast = state.forecast()
    assert forecast.num_admissible(24) == 0
    # It is admitted later nevertheless, or no sequence would ever end.
    assert (forecast.finish_steps(24)[1] > 0).all()


def test_no_sequence_is_admissible_where_running_ones_exceed_the_limit():
    state = State(running=[(4, 1, 0, 20, -1)], waiting=[(1, 1, 1, 0, -1)], nodes=[])
    assert state.forecast().num_admissible(5) == 0
    assert state.forecast().num_admissible(6) == 1


def test_pages_that_running_sequences_free_in_time_count_as_room():
    # The newcomer grows only after the running one has gone.
    state = State(running=[(8, 2, 0, 2, -1)], waiting=[(4, 1, 4, 12, -1)], rate=1)
    assert state.forecast().num_admissible(3) == 0
    assert state.forecast().num_admissible(4) == 1


def test_unreferenced_cached_pages_are_in_use_once_a_sequence_with_them_is_admitted():
    state = State(
        running=[(2, 1, 0, 1, -1)], waiting=[(9, 3, 1, 0, 0), (9, 3, 1, 0, 0)], nodes=[(-1, 2)]
    )
    forecast = state.forecast()
    assert [forecast.peak(count) for count in range(3)] == [1, 4, 5]
    assert forecast.num_admissible(4) == 1


def test_columns_of_shared_prefixes():
    prefixes = SharedPrefixes(4)
    prefixes.enter([0, 1], np.array([7, 3, 9], np.int32))
    prefixes.enter([2], np.array([7, 3, 4, 5], np.int32))
    prefixes.enter([3], np.array([7, 3], np.int32))  # a waiting one
    leaf = prefixes.leaf.tolist()
    running = columns([(12, 3, 0, 4, leaf[0]), (12, 3, 0, 9, leaf[1]), (17, 5, 0, 2, leaf[2])])
    waiting = columns([(9, 3, 1, 15, leaf[3])])
    forest = Forest(prefixes.parent, prefixes.end_column)
    forecast = Forecast(running, waiting, forest, page_size=4, prefill_rate=1)
    #  step                               0  1  2  3  4  5  6  7  8  9
    assert forecast.use(0).tolist() == [6, 8, 8, 5, 5, 5, 5, 5, 5, 6]
    assert forecast.use(1)[10:].tolist() == [5, 5, 5, 6, 6, 6, 6]


def test_finish_of_the_queue_is_about_right():
    # Four at a time, each for 1 + 99 steps; those that run end now.
    state = State(
        page_size=100,
        rate=1000,
        running=[(100, 1, 0, 0, -1)] * 4,
        waiting=[(50, 1, 50, 99, -1)] * 12,
    )
    _, ends = state.forecast().finish_steps(8)
    assert ends[:2].tolist() == [100, 100]
    assert (np.diff(ends) >= 0).all()
    assert 300 <= ends[-1] < 450


def pace(running: list[Row], waiting: list[Row], limit: int, **options) -> int:
    state = State(page_size=1, rate=1000, running=running, waiting=waiting)
    return state.forecast().prefill_pace(limit, 1000, options.pop("multiple", 1), **options)


def test_pace_keeps_up_with_the_pages_that_come_free():
    # One ends every 20 steps; the first leaves its pages to those that still grow.
    running = [(100 - 20 * i, 100 - 20 * i, 0, 20 * i, -1) for i in range(1, 5)]
    waiting = [(100, 100, 100, 100, -1)] * 10
    assert pace([*running, (100, 100, 100, 100, -1)], waiting, 400) == 5
    assert pace([*running, (100, 100, 50, 100, -1)], waiting, 400) == 3


def test_pace_is_rounded_up_and_bounded():
    running = [(10, 10, 0, 10, -1), (100, 100, 95, 5, -1)]
    assert pace(running, [], 200) == 10
    assert pace(running, [], 200, multiple=16) == 16
    assert pace([(10, 10, 0, 1, -1), (5000, 5000, 5000, 1, -1)], [], 9000, multiple=16) == 1000


def test_pace_catches_up_where_there_is_room():
    running = [(1, 1, 0, 5000, -1)]
    waiting = [(100, 100, 100, 50, -1)] * 64
    assert pace(running, waiting, 20_000, catch_up_steps=32) == 200
    assert pace(running, waiting, 5000) == 0  # all pages are promised
    assert pace(running, [], 20_000) == 0
