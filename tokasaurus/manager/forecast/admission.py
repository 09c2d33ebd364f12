"""Which waiting sequences may run, by a forecast of the KV cache.

Joins four things that know nothing of each other: what is learned about lengths (``learning``), the
rows of the forecast (``rows``), the use of pages at each coming step (``use_curve``), and the wait
after a refusal (``patience``). The use of pages is computed from all running sequences when it is
needed, at most once in REFRESH_INTERVAL steps, and patched in between.

Lets sequences run if, by this, use never exceeds the limit. Does not decide which one comes first,
and knows nothing of batches except that a step takes one, or a round of the lanes.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from tokasaurus.config.slices import ManagerConfig
from tokasaurus.manager.counters import Counters
from tokasaurus.manager.forecast.curve import Expected, Forecast, ForecastRows, Forest
from tokasaurus.manager.forecast.learning import LengthLearning
from tokasaurus.manager.forecast.patience import Patience
from tokasaurus.manager.forecast.rows import (
    Candidate,
    candidate_rows,
    running_forest,
    running_rows,
)
from tokasaurus.manager.forecast.use_curve import UseCurve
from tokasaurus.manager.order import priority_of
from tokasaurus.manager.running import RunningSequences
from tokasaurus.manager.sequence import Request, Sequence
from tokasaurus.manager.slots import IndexArray
from tokasaurus.protocol.arrays import Int64Array
from tokasaurus.rounding import ceil_div

__all__ = ["REFRESH_INTERVAL", "AdmissionControl"]

REFRESH_INTERVAL = 16  # steps

# Where there is room for every sequence, a refresh is needed only to learn.
_LONGEST_REST = 1024  # steps
_MOST_UNLEARNED = 16384  # ends

# As long as the cache would not be fuller than this if all sequences became as long as they may,
# nothing more exact is computed.
_ROOMY = 0.9

_NEVER = -1  # an end before the first step: not in the forecast


class _Question(NamedTuple):
    """The rows about which ``num_admissible`` was asked."""

    rows: ForecastRows
    forest: Forest  # what they share
    num_unfed: int  # prompt tokens that are fed before theirs


class AdmissionControl:
    """The forecast of one replica.

    Attributes:
        prefill_pace: prompt tokens to feed per step; None for as many as its batches take.
        max_tokens: of the batches of a step.

    Args:
        config: the manager's slice.
        running: the sequences in slots.
        counters: to count in.
    """

    def __init__(
        self, config: ManagerConfig, running: RunningSequences, counters: Counters
    ) -> None:
        self._config = config.admission
        self.max_tokens = config.max_tokens_per_forward * config.num_lanes
        self._page_size = config.page_size
        self._running = running
        self._counters = counters
        self._utilization = self._config.target_utilization if self._config.predict_lengths else 1.0
        self.prefill_pace: int | None = None
        self._learning = LengthLearning(config, running)
        self._curve = UseCurve(config.page_size, self.max_tokens)
        self._patience = Patience(config.page_size)
        self._step = 0  # the present one: steps planned
        self._refreshed_at = -REFRESH_INTERVAL
        self._refresh_at = 0
        self._question: _Question | None = None  # None where there was room without a forecast

    def mean_tokens(self, max_tokens: int) -> float:
        """How many tokens a sequence with this limit generates, as far as that is known."""
        return self._learning.mean_tokens(max_tokens)

    @property
    def step(self) -> int:
        """The present one: how many were planned."""
        return self._step

    @property
    def limit(self) -> int:
        """Pages that may be in use, of those that are not pinned."""
        pages = self._running.pages
        return int(self._utilization * (pages.pool.num_pages - pages.num_pinned))

    # --- what happens ----------------------------------------------------------------------------

    def open(self, request: Request) -> None:
        """The request will have sequences that run."""
        self._learning.open(request)
        if not self._config.greedy_prefill and self.prefill_pace is None:
            self._refresh_at = self._step  # there was nothing to feed when it was last computed

    def close(self, request: Request) -> None:
        """All of the request's sequences have ended."""
        self._learning.close(request)

    def end(self, sequences: Rows[Sequence], by_itself: Rows[bool]) -> None:
        """Sequences have ended, each by itself or aborted; those that had slots still have them."""
        self._learning.end(sequences, by_itself)

    def pages_come_free(self) -> None:
        """Pages that were pinned are free."""
        self._patience.pages_come_free()

    def release(self, slots: IndexArray) -> None:
        """These slots are about to give back their pages."""
        self._patience.pages_come_free()
        if self._step >= self._refresh_at:
            return  # the forecast is computed anew before it is asked
        # Their last step was the one before: no sequence decodes in this one yet.
        step = self._step - 1
        num_steps = self._running.slots.predicted_end[slots] - step
        is_early = num_steps >= 0
        if is_early.any():
            slots = slots[is_early]
            num_pages, num_positions = self._running.unshared(slots)
            rows = ForecastRows(
                length=num_positions,
                num_pages=num_pages,
                num_prompt_tokens=np.zeros(len(slots), np.int64),
                num_steps=num_steps[is_early],
                leaf=np.full(len(slots), -1, np.int64),
            )
            self._curve.remove(rows, step)

    def admit(self, slots: IndexArray) -> None:
        """The first rows of the last question run from now on, in these slots."""
        predicted_end = self._running.slots.predicted_end
        if self._question is None:  # there was room without a forecast, so they are in none
            predicted_end[slots] = _NEVER
            return
        admitted = self._question.rows[: len(slots)]
        self._curve.add(admitted, self._question.forest, self._question.num_unfed, self._step)
        # As if they had all been fed by now. This is wrong by a few steps until the next refresh.
        predicted_end[slots] = self._step + admitted.num_steps

    def pass_step(self) -> None:
        """The first batch of a step was planned."""
        self._step += 1

    # --- what follows from it --------------------------------------------------------------------

    def may_ask(self, head: Sequence | None) -> bool:
        """Whether asking is worth its time, where ``head`` is next in the queue.

        It is not if ``head`` was refused a short while ago and nothing happened since.
        """
        return self._patience.is_over(head, self._step)

    def num_admissible(self, candidates: Rows[Candidate]) -> int:
        """How many of the candidates' rows, from the first on, may run."""
        self._patience.forget()
        self._curve.most_used = max(self._curve.most_used, self._running.pages.num_held)
        if self._step >= self._refresh_at:
            num_pages = sum(candidate.most_pages(self._page_size) for candidate in candidates)
            if self._is_roomy_with(num_pages):
                self._question = None
                self._curve.most_used += num_pages
                return sum(candidate.num_rows for candidate in candidates)
            self.refresh((), self.max_tokens - self._running.num_running)
        rows, forest = candidate_rows(candidates, self._page_size, self._learning)
        self._question = _Question(rows, forest, self._running.num_unfed_tokens())
        if self._is_roomy_with(rows.most_pages(self._page_size)):
            return len(rows)
        count = self._forecast_admissible(self._question)
        if count < len(rows):
            count = max(count, self.num_outranking(candidates))
        if count < len(rows):
            num_rows = accumulate(candidate.num_rows for candidate in candidates)
            num_admitted = sum(total <= count for total in num_rows)
            self._patience.refuse(candidates[num_admitted].sequence, self._step)
        return count

    def num_outranking(self, candidates: Rows[Candidate]) -> int:
        """How many of the candidates' rows, from the first on, may run whatever the forecast says.

        These outrank a sequence that runs. They and all running sequences that are no less
        important fit the cache however long they become; the others give way when it gets full.
        """
        slots = self._running.slots
        lowest = priority_of(int(slots.order.max()))
        running = (slots.order >= 0).nonzero()[0]
        priorities = priority_of(slots.order[running])
        num_pinned = slots.num_pseudo[running] // self._page_size
        longest = ceil_div(slots.final_length[running], self._page_size) - num_pinned
        num_rows = num_pages = 0
        for candidate in candidates:
            priority = priority_of(candidate.sequence.order)
            if priority >= lowest:
                break
            room = self.limit - num_pages - int(longest[priorities <= priority].sum())
            each = candidate.most_pages_each(self._page_size)
            count = min(candidate.num_rows, max(0, room) // each)
            num_rows += count
            num_pages += count * each
            if count < candidate.num_rows:
                break
        return num_rows

    def finish_steps(self, waiting: Rows[Candidate]) -> tuple[IndexArray, Int64Array, Int64Array]:
        """When each sequence is predicted to end; estimates for those that are not admissible now.

        Args:
            waiting: in the order in which they may run.

        Returns:
            [running] slots, [running] the steps until each ends, and [rows] the same for
            ``waiting``.
        """
        slots, rows = running_rows(self._running, self._learning)
        return slots, *self._whole_forecast(rows, waiting).finish_steps(self.limit)

    def expect(self, waiting: Rows[Candidate]) -> Expected:
        """The same, with the use of pages that goes with it."""
        _, rows = running_rows(self._running, self._learning)
        return self._whole_forecast(rows, waiting).expect(self.limit)

    @property
    def refresh_is_due(self) -> bool:
        """Whether to refresh though no admission needs it.

        A refresh is due where the pace of prompts depends on it, or where much was not learned yet.
        """
        if self._learning.num_unlearned > _MOST_UNLEARNED:
            return True
        rest = 0 if not self._config.greedy_prefill else _LONGEST_REST
        return self._step >= self._refresh_at + rest

    def refresh(self, waiting: Rows[Candidate], budget: int) -> None:
        """Learns from what happened since the last time, and computes the use of pages anew.

        Args:
            waiting: the candidates that are likely to run next, for the pace at which prompts are
                fed; none where that is not limited.
            budget: prompt tokens that a step can feed.
        """
        self._judge()
        self._refresh_at = self._step + REFRESH_INTERVAL
        self._learning.refresh()
        slots, rows = running_rows(self._running, self._learning)
        self._curve.prefill_rate = max(1, budget)
        forecast = self._whole_forecast(rows, waiting)
        self.prefill_pace = None
        if not self._config.greedy_prefill:
            pace = forecast.prefill_pace(self.limit, budget, self._config.prefill_round_up_multiple)
            if pace:
                self.prefill_pace = self._curve.prefill_rate = pace
        self._running.slots.predicted_end[slots] = self._step + forecast.running_ends
        self._curve.renew(forecast.use(), self._step)
        self._refreshed_at = self._step

    def _is_roomy_with(self, num_pages: int) -> bool:
        """Whether there is room for this number of further pages, whenever they are taken."""
        return self._curve.most_used + num_pages <= _ROOMY * self.limit

    def _forecast_admissible(self, question: _Question) -> int:
        """How many of the rows the forecast has room for."""
        self._curve.bring_up_to_date(self._step)
        coming = self._curve.coming(self._step)
        # A sequence that outlives its prediction is not in the forecast until the next refresh. But
        # one without a token to come gives back its pages when they are wanted.
        num_missing = max(0, self._num_lasting_pages() - int(coming[0]))
        forecast = self._curve.forecast(
            waiting=question.rows,
            forest=question.forest,
            others=coming + num_missing,
            num_unfed=question.num_unfed,
        )
        return forecast.num_admissible(self.limit)

    def _whole_forecast(self, running: ForecastRows, candidates: Rows[Candidate]) -> Forecast:
        """A forecast of all running sequences and of these candidates."""
        shared = running_forest(self._running)
        waiting, forest = candidate_rows(candidates, self._page_size, self._learning)
        # The nodes of waiting sequences come after those of running ones.
        np.add(waiting.leaf, len(shared.parent), out=waiting.leaf, where=waiting.leaf >= 0)
        return self._curve.forecast(
            running=running,
            waiting=waiting,
            forest=Forest(
                np.concatenate([shared.parent, forest.parent]),
                np.concatenate([shared.end_column, forest.end_column]),
            ),
        )

    def _judge(self) -> None:
        """Counts by how much the use of pages differs from what was forecast."""
        if not 0 < self._step - self._refreshed_at <= 2 * REFRESH_INTERVAL:
            return
        self._curve.bring_up_to_date(self._step)
        num_forecast = int(self._curve.coming(self._step)[0])
        self._counters.num_forecasts += 1
        self._counters.num_forecast_pages_off += abs(self._num_lasting_pages() - num_forecast)

    def _num_lasting_pages(self) -> int:
        """Pages in use, without those that are given back as soon as they are wanted."""
        num_pages, _ = self._running.unshared(self._running.slots.fully_planned())
        return self._running.pages.num_held - int(num_pages.sum())
