"""The search of ``toka tune``: which trials run, in which order, and for how long."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokasaurus.errors import ConfigError
from tokasaurus.planner.candidates import Layout, Question, candidate
from tokasaurus.planner.demand import Demand
from tokasaurus.rounding import round_up
from tokasaurus.tuning.coordinates import Coordinate, Point, climb
from tokasaurus.tuning.trial import Task
from tokasaurus.tuning.trial_log import TrialLog
from tokasaurus.tuning.trial_process import Measured, run_trial

__all__ = ["Result", "Row", "Tuner"]

GAIN = 1.03  # a setting is better if it is faster by this factor; less may be chance
_SIZES = ("dp_size", "tp_size", "pp_size")
_PAGE = 64  # tokens: a multiple of every page size that is tried
_LOST = 4.0  # a run that takes this many times its share has lost
_CONFIRMING = 3  # trials that have to fit behind the one that begins, itself included
_READY_S = 600.0  # kernels may have to be compiled

Run = Callable[[Task, float, float], Measured]


@dataclass(frozen=True)
class Row:
    """One trial: a point, or the engine's defaults, and what was measured."""

    name: str
    flags: Mapping[str, Any]
    measured: Measured
    key: str = ""  # the name under which the log has it


@dataclass(frozen=True)
class Result:
    """The outcome.

    Attributes:
        flags: of the best setting, as an engine takes them.
        rows: of all trials, in the order in which they ran.
        best: the row of the best setting: measured once more at the end, if there was time.
        defaults: the row of the engine's defaults, measured like the best one.
        is_complete: whether the search ended by itself, not because time ran out.
    """

    flags: Mapping[str, Any]
    rows: Sequence[Row]
    best: Row
    defaults: Row
    is_complete: bool


@dataclass
class Tuner:
    """Runs trials.

    Args:
        question: model and machine.
        demand: the workload.
        model: as the user wrote it.
        repetitions: of each run; the fastest counts.
        run_s: that a run should take.
        max_s: no trial begins later than this after the tuner was made.
        progress: is told of each trial.
        run: runs a task, with seconds for loading and for a run.
    """

    question: Question
    demand: Demand
    model: str | None
    repetitions: int
    run_s: float
    max_s: float
    progress: Callable[[str], None]
    run: Run = run_trial
    _until: float = field(init=False)

    def __post_init__(self) -> None:
        self._until = time.monotonic() + self.max_s

    def measure(self, point: Point, part: Demand) -> Measured:
        """Runs a part of the workload once, and keeps nothing.

        Raises:
            ConfigError: the point contradicts itself, or does not fit.
        """
        return self.run(self._task(self.flags_of(point, part), part, 1), _READY_S, self._limit_s)

    def tune(
        self, start: Point, coordinates: Sequence[Coordinate], part: Demand, log: TrialLog
    ) -> Result:
        """Searches from a point.

        Args:
            start: the first point.
            coordinates: that may change.
            part: of the workload, which every run takes.
            log: what has been measured with this part.

        Raises:
            ConfigError: nothing runs, or there is no time for it; says why.
        """
        search = _Search(self, part, log)
        defaults = search.trial("the engine's defaults", self._common())
        if defaults is None:
            raise ConfigError(f"max_s={self.max_s:g} leaves no time for a trial; raise it")
        best, is_complete = climb(start, coordinates, search.rate, GAIN)
        rate = search.rate(best)
        if rate is None:
            raise ConfigError(
                f"max_s={self.max_s:g} leaves no time for a trial beside the engine's defaults;"
                " raise it, and the same command goes on"
            )
        if not rate:
            problems = {row.measured.problem for row in search.rows}
            raise ConfigError("no setting runs:\n" + "\n".join(sorted(problems)))
        return search.confirmed(best, defaults, is_complete)

    def flags_of(self, point: Point, part: Demand) -> dict[str, Any]:
        """The flags of a point as an engine takes them, with as much KV cache as can be of use.

        Raises:
            ConfigError: they contradict one another, or do not fit.
        """
        sizes = {name: point[name] for name in _SIZES if name in point}
        flags = {name: value for name, value in point.items() if name not in sizes}
        layout = Layout(**{**dict.fromkeys(_SIZES, 1), **self.question.sizes, **sizes})
        found = candidate(self.question, layout, **flags)
        most = found.slices.server.max_request_tokens
        if self.demand.longest > most:
            raise ConfigError(
                f"a request may take {self.demand.longest} tokens, and there is room for {most}"
            )
        chosen = {**self._common(), **dataclasses.asdict(layout), **found.flags}
        if chosen["kv_cache_num_tokens"] == "auto" and self.question.device.kind == "cpu":
            # The memory is the host's, too: no more than all sequences can hold.
            num_running = min(self.demand.num_sequences, found.manager.max_running)
            useful = num_running * round_up(self.demand.longest, _PAGE)
            chosen["kv_cache_num_tokens"] = min(useful, found.kv_tokens)
        return chosen

    def left_s(self) -> float:
        """Seconds in which a trial may begin."""
        return self._until - time.monotonic()

    def trial(self, flags: Mapping[str, Any], part: Demand) -> Measured:
        """Runs an engine with these flags."""
        return self.run(self._task(flags, part, self.repetitions), _READY_S, self._limit_s)

    @property
    def _limit_s(self) -> float:
        return _LOST * self.run_s

    def _task(self, flags: Mapping[str, Any], part: Demand, repetitions: int) -> Task:
        vocab_size = self.question.facts.vocab_size
        return Task(self.model, dict(flags), list(part.trace), vocab_size, repetitions)

    def _common(self) -> dict[str, Any]:
        """Flags of every trial."""
        decided = {**self.question.flags, **self.question.sizes}
        return {**decided, "device": self.question.device.kind}


class _Search:
    """One search: its trials so far.

    Args:
        tuner: runs trials.
        part: of the workload.
        log: of trials that ran before, here or in an earlier search.
    """

    def __init__(self, tuner: Tuner, part: Demand, log: TrialLog) -> None:
        self.rows: list[Row] = []
        self._tuner = tuner
        self._part = part
        self._log = log
        self._trial_s = 0.0  # of the longest trial so far

    def rate(self, point: Point) -> float | None:
        """The tokens per second of a point; 0 if it does not run, None if no time is left."""
        try:
            flags = self._tuner.flags_of(point, self._part)
        except ConfigError as error:
            self.rows.append(Row(_name(point), {}, Measured(problem=str(error))))
            return 0.0
        # Two trials more confirm the result.
        row = self.trial(_name(point), flags, spare_s=_CONFIRMING * self._trial_s)
        return None if row is None else row.measured.tokens_per_s

    def trial(
        self, name: str, flags: Mapping[str, Any], again: str = "", spare_s: float = 0.0
    ) -> Row | None:
        """Runs a trial, unless it has run before; None if no more than these seconds are left."""
        key = " ".join(f"{flag}={value}" for flag, value in sorted(flags.items())) + again
        measured = self._log.get(key)
        if measured is None:
            if self._tuner.left_s() <= spare_s:
                return None
            started = time.monotonic()
            measured = self._tuner.trial(flags, self._part)
            self._trial_s = max(self._trial_s, time.monotonic() - started)
            self._log.add(key, measured)
        row = next((row for row in self.rows if row.key == key), None)
        if row is None:
            row = Row(name + again, flags, measured, key)
            self.rows.append(row)
            rate = f"{measured.tokens_per_s:,.0f} tokens/s" if measured.seconds else "none: "
            self._tuner.progress(f"{row.name}: {rate}{measured.problem}")
        return row

    def confirmed(self, best: Point, defaults: Row, is_complete: bool) -> Result:
        """Measures the best setting and the defaults once more: the best one was lucky, too."""
        flags = self._tuner.flags_of(best, self._part)
        first = self.trial(_name(best), flags)
        again = self.trial(_name(best), flags, " (again)")
        last = again or first
        assert last is not None  # the search has measured it
        own = self.trial(defaults.name, defaults.flags, " (again)") or defaults
        if own.measured.tokens_per_s > last.measured.tokens_per_s:
            flags, last = dict(own.flags), own
        return Result(flags, self.rows, last, own, is_complete and again is not None)


def _name(point: Point) -> str:
    return " ".join(f"{name}={value}" for name, value in point.items())
