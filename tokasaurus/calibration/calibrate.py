"""Runs the measurements, and checks the cost model with batches that it has not seen."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from tokasaurus.calibration.cases import (
    Case,
    Limits,
    attention_cases,
    draw_cases,
    held_out_cases,
    row_cases,
)
from tokasaurus.calibration.fitting import CaseSeconds, fit_costs
from tokasaurus.calibration.other_work import OtherWork, undisturbed
from tokasaurus.config.slices import ReplicaSlices, WorkerConfig
from tokasaurus.errors import ConfigError
from tokasaurus.model.worker.timed_worker import PartSeconds, TimedWorker
from tokasaurus.planner.cost_model import CostModel

__all__ = ["Calibration", "HeldOut", "calibrate"]

_MAX_POSITIONS = 1 << 16


@dataclass(frozen=True)
class HeldOut:
    """A batch that the cost model was not fitted to."""

    name: str
    measured_s: float
    predicted_s: float

    @property
    def wrong(self) -> float:
        """How far the prediction is off, as a share of the measured time."""
        return self.predicted_s / self.measured_s - 1


@dataclass(frozen=True)
class Calibration:
    """The result.

    Attributes:
        cost: the cost model; its error is twice the root of the mean square of the deviations of
            ``held_out``, or the spread of the measurements if that is larger.
        held_out: batches that it was checked with.
        spread: of measurements of the same batch; the mean of ``CaseSeconds.spread``.
        other_work: the share of the cores that went to other work in one of the rounds, at most.
    """

    cost: CostModel
    held_out: tuple[HeldOut, ...]
    spread: float
    other_work: float


def calibrate(
    replica: ReplicaSlices, rounds: int, progress: Callable[[str], None] = lambda _: None
) -> Calibration:
    """Measures what the replica's batches cost. Takes about a minute for a small model on a CPU.

    The cases take turns, so that other work disturbs all alike. A round in which there was much of
    it is repeated.

    Args:
        replica: of one worker. Its weights are random unless its files are there.
        rounds: how often each case is measured, after it has run once.
        progress: takes a line now and then.

    Raises:
        ConfigError: the replica has several workers, or limits that leave nothing to measure.
        ModelError: the model cannot be served.
    """
    if len(replica.workers) > 1:
        raise ConfigError(
            f"the replica has {len(replica.workers)} workers, and measurements need one:"
            " leave out tp_size and pp_size"
        )
    config = replica.workers[0]
    limits = _limits(config)
    by_rows, by_context = row_cases(limits), attention_cases(limits)
    by_draw, unseen = draw_cases(limits), held_out_cases(limits)
    if not by_context or not unseen:
        raise ConfigError(
            "batches of this engine are too small to measure what context costs: raise"
            " max_tokens_per_forward, max_seqs_per_forward, max_num_tokens_per_request or"
            " kv_cache_num_tokens"
        )
    cases = {*by_rows, *by_draw.values(), *unseen}
    cases.update(case for pair in by_context for case in pair)
    seconds, other_work = _measure(config, limits, cases, rounds, progress)
    cost = fit_costs(
        {case: seconds[case] for case in by_rows},
        {(case, base): (seconds[case], seconds[base]) for case, base in by_context},
        {name: (case, seconds[case]) for name, case in by_draw.items()},
    )
    held_out = tuple(
        HeldOut(case.name, seconds[case].total_s, _predicted_s(cost, case)) for case in unseen
    )
    spread = statistics.mean(each.spread for each in seconds.values())
    deviation = 2 * math.sqrt(statistics.mean(each.wrong**2 for each in held_out))
    cost = msgspec.structs.replace(cost, error=max(deviation, spread))
    return Calibration(cost, held_out, spread, other_work)


def _limits(config: WorkerConfig) -> Limits:
    return Limits(
        max_rows=config.max_tokens_per_forward,
        max_sequences=min(config.max_seqs_per_forward, config.num_slots),
        max_length=config.max_request_tokens,
        max_positions=min(_MAX_POSITIONS, config.num_pages * config.page_size),
        page_size=config.page_size,
    )


def _measure(
    config: WorkerConfig,
    limits: Limits,
    cases: Iterable[Case],
    rounds: int,
    progress: Callable[[str], None],
) -> tuple[dict[Case, CaseSeconds], float]:
    """The seconds of each case, and the largest share of the cores that went to other work."""
    # In the order of their rows, so that no case follows the largest one by chance.
    ordered = sorted(cases, key=lambda case: (case.num_rows, case.name))
    num_pages = max(case.num_pages(limits.page_size) for case in ordered)
    worker = TimedWorker(replace(config, use_groups=True, num_pages=num_pages))
    worker.fill_cache()
    worker.warm_up()

    def measure() -> list[list[PartSeconds]]:
        progress(f"measuring {len(ordered)} batches")
        gc.collect()
        return [_time_twice(worker, case, limits.page_size) for case in ordered]

    measure()  # the first round loads libraries and touches memory
    found, other_work = undisturbed(measure, rounds, OtherWork(), progress)
    by_case = zip(ordered, zip(*found, strict=True), strict=True)
    summaries = {
        case: _summary([each for pair in pairs for each in pair]) for case, pairs in by_case
    }
    return summaries, other_work


def _time_twice(worker: TimedWorker, case: Case, page_size: int) -> list[PartSeconds]:
    worker.time(case.entering(page_size))
    timed = case.timed(page_size)
    return [worker.time(timed) for _ in range(2)]


def _summary(rounds: list[PartSeconds]) -> CaseSeconds:
    """Lower quartiles: other work makes some times longer, and none shorter."""
    parts = np.array(rounds)
    low, middle, high = np.percentile(parts.sum(axis=1), [25, 50, 75])
    layers_s, head_s, rest_s = np.percentile(parts, 25, axis=0).tolist()
    return CaseSeconds(layers_s, head_s, rest_s, float((high - low) / 2 / middle))


def _predicted_s(cost: CostModel, case: Case) -> float:
    draw_s = cost.draws.of(case.sampling, case.num_logprobs)
    return cost.batch_s(case.work()._replace(draw_s=case.num_decodes * draw_s))
