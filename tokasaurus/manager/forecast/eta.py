"""When requests will have ended, in seconds: steps of the forecast times the duration of one.

An estimate costs milliseconds where thousands of sequences wait, so one is made only now and then.
"""

from __future__ import annotations

from itertools import chain

import numpy as np

from tokasaurus.manager.forecast.admission import AdmissionControl
from tokasaurus.manager.forecast.rows import Candidate, uncached_candidate
from tokasaurus.manager.running import RunningSequences
from tokasaurus.manager.waiting import Backlog
from tokasaurus.protocol.messages import Eta

__all__ = ["MAX_QUEUED", "StepTimer", "eta", "first_candidates"]

# Sequences of the queue that are looked at one by one; those behind count as a sum.
MAX_QUEUED = 1024

_NEW_SHARE = 0.05  # of the latest measurement in the average


class StepTimer:
    """The duration of a step while a batch is always in flight: a moving average."""

    def __init__(self) -> None:
        self.seconds = 0.0  # 0 until a step was measured
        self._absorbed_at: float | None = None

    def interrupt(self) -> None:
        """Something else has run between two batches: the time until the next is not a step's."""
        self._absorbed_at = None

    def absorbed(self, now: float, num_steps: int, is_idle: bool) -> None:
        """Takes the time at which results were absorbed.

        Args:
            now: that time.
            num_steps: steps that began with the batches of these results.
            is_idle: whether nothing else is in flight.
        """
        if num_steps:
            if self._absorbed_at is not None:
                measured = (now - self._absorbed_at) / num_steps
                share = _NEW_SHARE if self.seconds else 1.0
                self.seconds += share * (measured - self.seconds)
            self._absorbed_at = now
        if is_idle:
            self._absorbed_at = None


def first_candidates(running: RunningSequences, backlog: Backlog) -> list[Candidate]:
    """The first MAX_QUEUED sequences that wait, in the order in which they may run."""
    candidates: list[Candidate] = []
    num_rows = 0
    for sequence in chain(running.prefilling, backlog.in_order()):
        if num_rows >= MAX_QUEUED:
            break
        num_forks = min(backlog.num_followers(sequence), MAX_QUEUED - num_rows)
        if sequence.slot >= 0:  # it runs already, and only its forks wait
            candidates.append(Candidate(sequence, 0, 0, num_forks))
        else:
            candidates.append(uncached_candidate(sequence, num_forks))
        num_rows += candidates[-1].num_rows
    return candidates


def eta(
    running: RunningSequences, backlog: Backlog, admission: AdmissionControl, step_s: float
) -> Eta:
    """The estimate for the requests with samples that run or are among the first in the queue."""
    candidates = first_candidates(running, backlog)
    slots, running_ends, waiting_ends = admission.finish_steps(candidates)
    counts = [candidate.num_rows for candidate in candidates]
    ids = [candidate.sequence.request.message.request_id for candidate in candidates]
    request_ids = np.concatenate(
        [running.slots.request_id[slots], np.repeat(np.array(ids, np.int64), counts)]
    )
    ends = np.concatenate([running_ends, waiting_ends])
    # The last row of each request.
    request_ids, rows = np.unique(request_ids, return_inverse=True)
    last = np.zeros(len(request_ids), np.int64)
    np.maximum.at(last, rows, ends)
    # Each of those behind takes as long as those before them did.
    backlog_steps = float(ends.max(initial=0))
    if len(ends):
        backlog_steps *= max(1.0, backlog.num_sequences / len(ends))
    return Eta(
        request_ids=request_ids,
        seconds=(last + 1).astype(np.float64) * step_s,
        backlog_seconds=(backlog_steps + 1) * step_s,
    )
