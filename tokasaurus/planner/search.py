"""Finds a good configuration: a bound for every one, and simulations of a few.

1. Every layout of the devices that holds the model gets the limits of a grid, and a bound for each.
2. The best of each layout are simulated, as far as their bounds are near the best one.
3. From the fastest of them the search goes on to its neighbours, one limit at a time, while one is
   faster.

``docs/decisions/0037-how-the-planner-searches.md`` says why.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tokasaurus.errors import ConfigError
from tokasaurus.planner.bound import Bound, Means, bound
from tokasaurus.planner.candidates import Candidate, Layout, Question, candidate, fitting
from tokasaurus.planner.cost_model import CostModel
from tokasaurus.planner.demand import Demand
from tokasaurus.planner.device_costs import device_cost
from tokasaurus.planner.pipeline import Stages
from tokasaurus.planner.replay import Timing
from tokasaurus.planner.simulation import Simulated, simulate

__all__ = ["Outcome", "Plan", "Search"]

# Steps of each limit.
_GRID: Mapping[str, Sequence[int]] = {
    "max_seqs_per_forward": (32, 64, 128, 256, 512, 1024, 2048, 4096),
    "max_tokens_per_forward": (2048, 4096, 8192, 16384),
    "page_size": (16, 32, 64),
}
_LIMITS = frozenset({*_GRID, "kv_cache_num_tokens"})
_TIE = 1.02  # bounds that differ by less are equal
_CHANCE = 1.005  # simulated times that differ by less are equal
_NEAR = 2.0  # layouts whose bound is slower than the best by more are not simulated


@dataclass(frozen=True, eq=False)
class Outcome:
    """A configuration and what is known about it.

    Attributes:
        cost: of a batch of a replica.
        stages: of a replica's pipeline.
        bound: of a replica.
        simulated: None if it was not simulated.
        is_default: whether no limit was set, so that the engine takes its own.
    """

    candidate: Candidate
    cost: CostModel
    stages: Stages
    bound: Bound
    simulated: Simulated | None = None
    is_default: bool = False

    @property
    def seconds(self) -> float:
        """Until the demand is done: simulated, or at least."""
        return self.bound.seconds if self.simulated is None else self.simulated.seconds

    @property
    def tokens_per_s(self) -> float:
        """Of all replicas: simulated, or at most."""
        if self.simulated is not None:
            return self.simulated.tokens_per_s
        return self.candidate.layout.dp_size * self.bound.tokens_per_s


@dataclass(frozen=True)
class Plan:
    """The outcome of a search.

    Attributes:
        outcomes: the simulated ones, the fastest first; then the best bounds of other layouts.
        num_bounds: configurations that were ranked.
        ran_out: whether time ran out before the search ended by itself.
    """

    outcomes: Sequence[Outcome]
    num_bounds: int
    ran_out: bool

    @property
    def best(self) -> Outcome:
        return self.outcomes[0]


@dataclass
class Search:
    """One search.

    Args:
        question: what to plan.
        demand: what it serves.
        max_simulations: at most so many are simulated, besides the engine's defaults.
        max_s: and no new one begins after this number of seconds.
        manager_s: a turn of the manager.
        progress: is told what the search does.
    """

    question: Question
    demand: Demand
    max_simulations: int = 8
    max_s: float = 60.0
    manager_s: float = 0.5e-3
    progress: Callable[[str], None] = lambda _: None
    _bounds: dict[tuple[Layout, tuple[tuple[str, Any], ...]], Outcome | None] = field(
        default_factory=dict, init=False
    )
    _whole: Means | None = field(default=None, init=False)
    _most_tokens: int = field(default=0, init=False)  # of a request, in any configuration

    def run(self) -> Plan:
        """Searches.

        Raises:
            ConfigError: nothing holds the model, or the longest request.
        """
        until = time.monotonic() + self.max_s
        best = self._best_of_layouts(fitting(self.question))
        least = best[0].seconds
        simulated: dict[Outcome, Outcome] = {}
        for each in best[: max(self.max_simulations // 2, 1)]:
            if each.seconds <= _NEAR * least:
                self._simulate(each, simulated, until)
        self._climb(simulated, until)
        self._try_defaults(simulated, until)
        done = sorted((each for each in simulated.values() if each.simulated), key=_rank)
        if done:  # of those that are as fast as the fastest, the one with the smallest limits
            limit_s = _CHANCE * done[0].seconds
            done.sort(key=lambda each: (*_size(each, limit_s), each.seconds))
            done[1:] = sorted(done[1:], key=_rank)
        seen = {each.candidate.layout for each in done}
        rest = [each for each in best if each.candidate.layout not in seen]
        ran_out = time.monotonic() > until
        return Plan([*done, *rest], len(self._bounds), ran_out)

    def _best_of_layouts(self, found: dict[Layout, Candidate]) -> list[Outcome]:
        """The best bound of each layout, the best layout first."""
        best = []
        for layout in found:
            outcomes = list(self._grid(layout))
            if outcomes:
                least = min(each.seconds for each in outcomes)
                best.append(min(outcomes, key=partial(_size, limit_s=_TIE * least)))
        if not best:
            raise ConfigError(self._too_long())
        return sorted(best, key=_rank)

    def _grid(self, layout: Layout) -> Iterator[Outcome]:
        steps = {name: each for name, each in _GRID.items() if name not in self.question.flags}
        if "page_size" in steps:  # no bound depends on it
            steps["page_size"] = _GRID["page_size"][:1]
        for values in itertools.product(*steps.values()):
            outcome = self._bound(layout, dict(zip(steps, values, strict=True)))
            if outcome is not None:
                yield outcome

    def _bound(self, layout: Layout, flags: dict[str, Any]) -> Outcome | None:
        """The bound of a configuration; None if it does not fit, or not the longest request."""
        key = (layout, tuple(sorted(flags.items())))
        if key not in self._bounds:
            self._bounds[key] = self._bound_anew(layout, flags)
        return self._bounds[key]

    def _bound_anew(self, layout: Layout, flags: dict[str, Any]) -> Outcome | None:
        try:
            found = candidate(self.question, layout, **flags)
        except ConfigError:
            return None
        max_tokens = found.slices.server.max_request_tokens
        self._most_tokens = max(self._most_tokens, max_tokens)
        if self.demand.longest > max_tokens:
            return None
        cost, stages = device_cost(self.question, found)
        limit = bound(self._means(layout.dp_size), found.manager, cost, stages)
        return Outcome(found, cost, stages, limit)

    def _means(self, dp_size: int) -> Means:
        """The mean sequence of a replica's part of the demand."""
        if self._whole is None:
            self._whole = Means.of(self.demand)
        return self._whole.dealt(dp_size)

    def _simulate(
        self, outcome: Outcome, simulated: dict[Outcome, Outcome], until: float
    ) -> Outcome | None:
        """Simulates a configuration once; None if time or simulations have run out."""
        if outcome not in simulated:
            if len(simulated) >= self.max_simulations or time.monotonic() > until:
                return None
            words = " ".join(outcome.candidate.words)
            name = f"{len(simulated) + 1} of at most {self.max_simulations}: {words}"
            self._run_simulation(outcome, name, simulated, until)
        return simulated[outcome]

    def _run_simulation(
        self, outcome: Outcome, name: str, simulated: dict[Outcome, Outcome], until: float
    ) -> None:
        self.progress(f"simulating {name}")
        timing = Timing(outcome.cost, self.manager_s, stages=outcome.stages)
        found = simulate(outcome.candidate, self.demand, timing, until)
        simulated[outcome] = dataclasses.replace(outcome, simulated=found)

    def _climb(self, simulated: dict[Outcome, Outcome], until: float) -> None:
        """Goes from the fastest configuration to neighbours, while one of them is faster."""
        done = [each for each in simulated.values() if each.simulated is not None]
        if not done:
            return
        best = min(done, key=_rank)
        while True:
            better = None
            for neighbour in sorted(self._neighbours(best.candidate), key=_rank):
                outcome = self._simulate(neighbour, simulated, until)
                if outcome is not None and outcome.simulated is not None and _beats(outcome, best):
                    better = outcome
                    break
            if better is None:
                return
            best = better

    def _try_defaults(self, simulated: dict[Outcome, Outcome], until: float) -> None:
        """Simulates what the engine does by itself, for comparison, if no limit is decided."""
        done = [each for each in simulated.values() if each.simulated]
        if not done or not _LIMITS.isdisjoint(self.question.flags):
            return
        layout = min(done, key=_rank).candidate.layout
        own = self._bound_anew(layout, {"kv_cache_num_tokens": None})
        if own is not None:
            own = dataclasses.replace(own, is_default=True)
            self._run_simulation(own, "the engine's defaults", simulated, until)

    def _neighbours(self, candidate: Candidate) -> Iterator[Outcome]:
        """Configurations that differ in one limit, by one step."""
        manager = candidate.manager
        now = {
            "max_seqs_per_forward": manager.max_seqs_per_forward,
            "max_tokens_per_forward": manager.max_tokens_per_forward,
            "page_size": manager.page_size,
        }
        for name, steps in _GRID.items():
            if name in self.question.flags:
                continue
            at = min(range(len(steps)), key=lambda index: abs(steps[index] - now[name]))
            for other in steps[max(at - 1, 0) : at + 2]:
                if other != now[name]:
                    flags = {**now, name: other}
                    for decided in self.question.flags:
                        flags.pop(decided, None)
                    outcome = self._bound(candidate.layout, flags)
                    if outcome is not None:
                        yield outcome

    def _too_long(self) -> str:
        """Why no configuration takes the longest request."""
        positions = self.question.facts.max_position_embeddings
        reason = f"the model has {positions} positions; shorten it"
        if self.demand.longest <= positions:
            reason = (
                f"the largest KV cache that fits holds {self._most_tokens}; shorten it, or take"
                " more devices, or devices with more memory"
            )
        return (
            f"workload={self.demand.source}: its longest request may take {self.demand.longest}"
            f" tokens, and {reason}"
        )


def _rank(outcome: Outcome) -> float:
    """Fast ones first."""
    return outcome.seconds


def _size(outcome: Outcome, limit_s: float) -> tuple[bool, int, int]:
    """Of those within a time the smallest first: more seats only preempt, if pages are few."""
    manager = outcome.candidate.manager
    sizes = manager.max_seqs_per_forward, manager.max_tokens_per_forward
    return outcome.seconds > limit_s, *sizes


def _beats(outcome: Outcome, other: Outcome) -> bool:
    """Whether one is faster by more than simulations differ by chance."""
    return outcome.seconds * _CHANCE < other.seconds
