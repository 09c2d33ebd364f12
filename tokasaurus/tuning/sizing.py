"""How large a part of the workload a run takes, so that it lasts as long as was asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokasaurus.errors import ConfigError
from tokasaurus.tuning.coordinates import Point
from tokasaurus.tuning.trial_log import TrialLog
from tokasaurus.tuning.tuner import Tuner

__all__ = ["sized"]

_PROBE = 0.25  # of the time of a run
_SMALLER = 8  # times smaller is the next probe, if one takes too long
_NUM_PROBES = 4


def sized(
    path: Path,
    premises: Mapping[str, Any],
    tuner: Tuner,
    start: Point,
    tokens_per_s: float,
    *,
    fresh: bool,
) -> int:
    """The sequences of a run.

    An earlier search with the same premises has decided. Otherwise a short run at the first point
    tells the rate.

    Args:
        path: of the log.
        premises: of the search.
        tuner: runs the probe.
        start: the first point.
        tokens_per_s: that it is predicted to generate.
        fresh: do not look at the log.

    Raises:
        ConfigError: the first point does not run, or one sequence takes too long.
    """
    found = {} if fresh else dict(TrialLog.premises_of(path))
    known = found.pop("num_sequences", None)
    if known is not None and found == premises:
        return int(known)
    demand, run_s = tuner.demand, tuner.run_s
    mean_tokens = demand.num_output_tokens / demand.num_sequences
    size = max(int(_PROBE * run_s * tokens_per_s / mean_tokens), 1)
    for _ in range(_NUM_PROBES):
        part = demand.first(size)
        tuner.progress(f"a short run with {part.num_sequences} samples, to see how long it takes")
        measured = tuner.measure(start, part)
        if measured.seconds:
            rate = measured.tokens_per_s / mean_tokens
            return min(max(int(rate * run_s), 1), demand.num_sequences)
        if not measured.is_late or size == 1:
            break
        size = max(size // _SMALLER, 1)
    raise ConfigError(f"the first setting does not run a part of the workload: {measured.problem}")
