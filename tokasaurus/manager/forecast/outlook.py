"""The forecast as a picture: use of pages, admissions and ends over the next thousands of steps.

It answers by the same forecast as the predicted ends, and costs as much. So it is made only while
it is watched.
"""

from __future__ import annotations

import numpy as np

from tokasaurus.manager.forecast.admission import AdmissionControl
from tokasaurus.manager.forecast.eta import first_candidates
from tokasaurus.manager.running import RunningSequences
from tokasaurus.manager.waiting import Backlog
from tokasaurus.protocol.arrays import Int32Array, Int64Array
from tokasaurus.protocol.watching import MAX_BINS, Outlook
from tokasaurus.rounding import ceil_div

__all__ = ["outlook"]


def outlook(
    running: RunningSequences, backlog: Backlog, admission: AdmissionControl, step_s: float
) -> Outlook:
    """The outlook of this moment."""
    candidates = first_candidates(running, backlog)
    num_rows = sum(candidate.num_rows for candidate in candidates)
    expected = admission.expect(candidates)
    ends = np.concatenate([expected.running_ends, expected.waiting_ends])
    horizon = max(len(expected.all_pages), 1)
    stride = ceil_div(horizon, MAX_BINS)
    num_bins = ceil_div(horizon, stride)
    # The pages that the queue will have are estimates, whose sum may exceed what admission lets in.
    all_pages = np.minimum(
        expected.all_pages, max(admission.limit, int(expected.running_pages.max(initial=0)))
    )
    return Outlook(
        step=admission.step,
        step_s=step_s,
        stride=stride,
        used=running.pages.num_held,
        limit=admission.limit,
        running_pages=_largest(expected.running_pages, stride, num_bins),
        all_pages=_largest(all_pages, stride, num_bins),
        num_admitted=_counts(expected.waiting_starts, stride, num_bins),
        num_ended=_counts(ends, stride, num_bins),
        num_unseen=backlog.num_sequences - running.num_running - num_rows,
    )


def _largest(pages: Int64Array, stride: int, num_bins: int) -> Int32Array:
    """[bins] the most pages of each."""
    padded: Int32Array = np.zeros(num_bins * stride, np.int32)
    padded[: len(pages)] = pages
    largest: Int32Array = padded.reshape(num_bins, stride).max(axis=1)
    return largest


def _counts(steps: Int64Array, stride: int, num_bins: int) -> Int32Array:
    """[bins] how many of the steps are in each."""
    return np.bincount(steps // stride, minlength=num_bins)[:num_bins].astype(np.int32)
