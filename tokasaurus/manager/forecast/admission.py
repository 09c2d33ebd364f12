"""How many of those that wait may run: the forecast of the KV cache, kept up to date while it comes true.

Joins the predictor of lengths, the forecast and the slot table. The use of pages at each coming step is
computed from all running sequences when it is needed, once in REFRESH_INTERVAL batches at most. In between
it is patched: who is admitted adds what it will need, who ends takes away what it would have needed from
then on::

    pages
    ─────────────────────────────────────────── limit
             ┌┄┄┄┄┄┄┄┄┄┄┄┄┄┄┐                    ┄┄ with a sequence that was admitted since
         ╭───╯    ╭──╮       ┆                   ── what the refresh found
    ─────╯        ┆  ╰───────╰────────╮
         now                          ╰───────── step

Lets sequences run if, by this, use never exceeds the limit. Decides nothing about who comes first, and knows
nothing of batches but that each is a step.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from tokasaurus.config.slices import ManagerConfig
from tokasaurus.manager.counters import Counters
from tokasaurus.manager.forecast.curve import Forecast, Forest, Sequences
from tokasaurus.manager.forecast.lengths import NO_GROUP, IntArray, LengthPredictor
from tokasaurus.manager.running import RunningSequences
from tokasaurus.manager.sequence import Request, Sequence
from tokasaurus.manager.slots import IndexArray
from tokasaurus.manager.waiting import priority_of
from tokasaurus.protocol.arrays import Int64Array

__all__ = ["REFRESH_INTERVAL", "AdmissionControl", "Candidate"]

REFRESH_INTERVAL = 16  # steps

# Where there is room for everybody a refresh is needed only to learn.
_LONGEST_REST = 1024  # steps
_MOST_UNLEARNED = 16384  # ends

# Where the forecast refused and nothing ended since, time alone may have made room: whoever starts later has
# fewer pages when the use of the others peaks, one page for page_size steps. At most so long nobody asks.
_LONGEST_PATIENCE = 64  # steps

# As long as the cache could be no fuller than this if all became as long as they may, nothing more exact is
# asked.
_ROOMY = 0.9

_NEVER = -1  # an end before the first step: not in the forecast

_NOTHING: Int64Array = np.zeros(1, np.int64)
_NOBODY = Sequences.none()
_NO_FOREST = Forest.none()


class Candidate(NamedTuple):
    """Someone who might run now, and samples that would fork from it. Each of these is one row."""

    sequence: Sequence
    num_tokens: int  # of its prompt, that it would feed; 0 where it runs already, and has no row
    num_held_pages: int  # of its prompt's pages, those that others hold
    num_forks: int

    @property
    def num_rows(self) -> int:
        """Sequences that would run."""
        return self.num_forks + (self.num_tokens > 0)


class _Patch(NamedTuple):
    """What changed about the use of pages since it was last brought up to date."""

    step: int  # when
    sequences: Sequences  # as they were then
    forest: Forest  # what they share with one another
    num_unfed: int  # prompt tokens that were fed before theirs
    sign: int  # 1: they were admitted, -1: they ended


class AdmissionControl:
    """The forecast of one replica.

    Args:
        config: the manager's slice.
        running: the sequences in slots.
        counters: to count in.
    """

    def __init__(
        self, config: ManagerConfig, running: RunningSequences, counters: Counters
    ) -> None:
        self._counters = counters
        self._config = config.admission
        self._running = running
        self._slots = running.slots
        self._max_tokens = config.max_tokens_per_forward
        self._page_size = config.page_size
        self._num_pages = config.num_pages
        utilization = self._config.target_utilization if self._config.predict_lengths else 1.0
        self.limit = int(utilization * config.num_pages)
        learns, prior_mean = self._config.learn_lengths, self._config.prior_mean
        self._lengths = LengthPredictor(
            config.max_request_tokens,
            num_buckets=self._config.num_length_buckets,
            memory=self._config.length_memory,
            initial_wait=self._config.num_lengths_awaited if learns else 1,
            prior_mean=prior_mean if learns or prior_mean is not None else 1.0,
            prior_std=self._config.prior_std,
            std_scale=self._config.std_scale,
        )
        self._now = 0  # in batches planned
        self._use = _NOTHING  # pages at each step from `_use_from` on
        self._use_from = 0
        # Since the last refresh: (group, generated tokens, max_tokens), and generated tokens.
        self._ended: list[tuple[int, int, int]] = []
        self._aborted: list[int] = []
        self._most_used = 0  # no step uses more, were there no patches with sign -1
        self._patches: list[_Patch] = []
        self._asked: tuple[Sequences, Forest] | None = (
            None  # about whom num_admissible was asked last
        )
        self._num_unfed = 0  # prompt tokens that are fed before theirs
        self._refreshed_at = -REFRESH_INTERVAL
        self._refresh_at = 0
        self._refused: Sequence | None = None  # whom there was no room for when last asked
        self._retry_at = 0
        self._patience = config.page_size
        self._prefill_rate = config.max_tokens_per_forward  # tokens per step
        self.prefill_pace: int | None = None  # tokens to feed per step; None: as many as can be

    # --- what happens ------------------------------------------------------------------------------

    def open(self, request: Request) -> None:
        """The request will have sequences that run."""
        self._lengths.expect(request.message.max_tokens, request.message.n)
        if not self._config.greedy_prefill and self.prefill_pace is None:
            self._refresh_at = self._now  # there was nothing to feed when it was last computed
        if request.message.n > 1 and self._config.learn_lengths:
            request.length_group = self._lengths.open_group()

    def close(self, request: Request) -> None:
        """All of the request's sequences have ended."""
        if request.length_group != NO_GROUP:
            self._lengths.close_group(request.length_group)

    def end(self, sequences: Rows[Sequence], by_itself: Rows[bool]) -> None:
        """Sequences have ended, and those in slots still are. Learns from those that ended by themselves."""
        if not self._config.learn_lengths:
            return
        known = self._slots.known[[sequence.slot for sequence in sequences]].tolist()
        for sequence, is_observed, count in zip(sequences, by_itself, known, strict=True):
            num_generated = count if sequence.slot >= 0 else sequence.num_stored
            if num_generated == 0:
                continue
            request = sequence.request
            if is_observed:
                self._ended.append(
                    (request.length_group, num_generated, request.message.max_tokens)
                )
            else:
                self._aborted.append(num_generated)

    def release(self, slots: IndexArray) -> None:
        """These slots are about to give back their pages."""
        self._retry_at, self._patience = 0, self._page_size
        if self._now >= self._refresh_at:
            return  # the forecast is computed anew before it is asked
        # Their last step was the one before: nobody decodes in this one yet.
        step = self._now - 1
        num_steps = self._slots.predicted_end[slots] - step
        is_early = num_steps >= 0
        if is_early.any():
            slots = slots[is_early]
            shared = self._running.prefixes.num_shared_pages(slots).astype(np.int64)
            gone = Sequences(
                length=self._slots.length[slots] - shared * self._page_size,
                num_pages=self._slots.capacity[slots] // self._page_size - shared,
                num_prompt_tokens=np.zeros(len(slots), np.int64),
                num_steps=num_steps[is_early],
                leaf=np.full(len(slots), -1, np.int64),
            )
            self._patches.append(_Patch(step, gone, _NO_FOREST, 0, -1))

    def pass_step(self) -> None:
        """A batch was planned."""
        self._now += 1

    # --- what follows from it ----------------------------------------------------------------------

    def may_ask(self, head: Sequence | None) -> bool:
        """Whether asking is worth its time, where ``head`` is next in the queue: not if it was refused and
        nothing happened since."""
        return head is not self._refused or self._now >= self._retry_at

    def num_admissible(self, candidates: Rows[Candidate]) -> int:
        """How many of the candidates' rows, from the first on, may run."""
        self._refused, self._retry_at = None, 0
        num_used = self._num_pages - self._running.pages.num_available
        self._most_used = max(self._most_used, num_used)
        if self._now >= self._refresh_at:
            num_more = sum(map(self._largest, candidates))
            if self._most_used + num_more <= _ROOMY * self.limit:
                self._asked = None
                self._most_used += num_more
                return sum(candidate.num_rows for candidate in candidates)
            self.refresh((), self._max_tokens - self._running.num_running)
        rows, forest = self._asked = self._candidate_rows(candidates)
        self._num_unfed = sum(
            len(sequence.prompt_ids) - self._slots.length.item(sequence.slot)
            for sequence in self._running.prefilling
        )
        if self._most_used + self._most_pages(rows) <= _ROOMY * self.limit:
            return len(rows)
        self._apply_patches()
        coming = self._coming()
        # Who outlives its prediction is not in the forecast until the next refresh. But who has no token
        # to come gives back its pages when they are wanted.
        num_missing = max(0, num_used - self._num_planned_pages() - int(coming[0]))
        forecast = self._forecast(
            waiting=rows, forest=forest, others=coming + num_missing, num_unfed=self._num_unfed
        )
        count = forecast.num_admissible(self.limit)
        if count < len(rows):
            count = max(count, self.num_outranking(candidates))
        if count < len(rows):
            num_rows = accumulate(candidate.num_rows for candidate in candidates)
            num_admitted = sum(total <= count for total in num_rows)
            self._refused = candidates[num_admitted].sequence
            self._retry_at = self._now + self._patience
            self._patience = min(2 * self._patience, _LONGEST_PATIENCE)
        return count

    def num_outranking(self, candidates: Rows[Candidate]) -> int:
        """How many of the candidates' rows, from the first on, may run whatever others are predicted to need.

        Those are more important than somebody who runs. They and all that run and are no less important fit the
        cache however long they become; the others give way when it gets full.
        """
        slots = self._slots
        lowest = priority_of(int(slots.order.max()))
        running = (slots.order >= 0).nonzero()[0]
        priorities = priority_of(slots.order[running])
        longest = -(-slots.final_length[running] // self._page_size)
        num_rows = num_pages = 0
        for candidate in candidates:
            priority = priority_of(candidate.sequence.order)
            if priority >= lowest:
                break
            room = self.limit - num_pages - int(longest[priorities <= priority].sum())
            each = self._largest(candidate) // candidate.num_rows
            count = min(candidate.num_rows, max(0, room) // each)
            num_rows += count
            num_pages += count * each
            if count < candidate.num_rows:
                break
        return num_rows

    def admit(self, slots: IndexArray) -> None:
        """The first rows that ``num_admissible`` was asked about last run from now on, in these slots."""
        if self._asked is None:  # there is so much room that they are not in the forecast
            self._slots.predicted_end[slots] = _NEVER
            return
        rows, forest = self._asked
        admitted = rows[: len(slots)]
        self._patches.append(_Patch(self._now, admitted, forest, self._num_unfed, 1))
        self._most_used += self._most_pages(admitted)
        # As if they had all been fed by now. An error of steps, and the next refresh knows better.
        self._slots.predicted_end[slots] = self._now + admitted.num_steps

    def finish_steps(self, waiting: Rows[Candidate]) -> tuple[IndexArray, Int64Array, Int64Array]:
        """When everybody is predicted to end: estimates for those who are not admissible now.

        Args:
            waiting: in the order in which they may run.

        Returns:
            [running] slots, [running] the steps until each ends, and so [rows] for those who wait.
        """
        rows, sequences = self._running_rows()
        forecast = self._whole_forecast(sequences, waiting)
        return rows, *forecast.finish_steps(self.limit)

    @property
    def refresh_is_due(self) -> bool:
        """The pace of prompts depends on it, or it has not been needed for so long that much is to be learned."""
        if len(self._ended) + len(self._aborted) > _MOST_UNLEARNED:
            return True
        rest = 0 if not self._config.greedy_prefill else _LONGEST_REST
        return self._now >= self._refresh_at + rest

    def refresh(self, waiting: Rows[Candidate], budget: int) -> None:
        """Learns from what happened since the last time, and computes the use of pages anew.

        Args:
            waiting: who is likely to run next, for the pace at which prompts are fed; none where that is
                not limited.
            budget: prompt tokens that a batch can feed.
        """
        slots = self._slots
        self._judge()
        self._refresh_at = self._now + REFRESH_INTERVAL
        if self._config.learn_lengths:
            self._observe()
            known = (slots.absorbing & (slots.known > 0)).nonzero()[0]
            resting = self._running.resting
            groups = [sequence.request.length_group for sequence in resting]
            lengths = [sequence.num_stored for sequence in resting]
            self._lengths.refresh(
                np.append(slots.length_group[known], np.array(groups, np.int64)),
                np.append(slots.known[known], np.array(lengths, np.int64)),
            )
        rows, sequences = self._running_rows()
        self._prefill_rate = max(1, budget)
        forecast = self._whole_forecast(sequences, waiting)
        self.prefill_pace = None
        if not self._config.greedy_prefill:
            pace = forecast.prefill_pace(self.limit, budget, self._config.prefill_round_up_multiple)
            self.prefill_pace = pace or None
            self._prefill_rate = pace or self._prefill_rate
        slots.predicted_end[rows] = self._now + forecast.running_ends
        self._use, self._use_from = forecast.use(), self._now
        self._most_used = int(self._use.max(initial=0))
        self._patches.clear()
        self._refreshed_at = self._now

    def _running_rows(self) -> tuple[IndexArray, Sequences]:
        """Slots that hold pages, those whose prompts are being fed last and in order; and as rows."""
        slots, page_size = self._slots, self._page_size
        prefilling = [sequence.slot for sequence in self._running.prefilling]
        is_decoding = slots.order >= 0
        is_decoding[prefilling] = False
        rows = np.concatenate([is_decoding.nonzero()[0], np.array(prefilling, np.intp)])
        length = slots.length[rows].astype(np.int64)
        decodes_from = np.maximum(length, slots.prompt_end[rows])
        predicted = self._predict(
            slots.length_group[rows],
            slots.known[rows].astype(np.int64),
            slots.max_tokens[rows],
            slots.order[rows],
        )
        # The last token is not fed.
        end = np.minimum(slots.prompt_length[rows] + predicted - 1, slots.final_length[rows])
        return rows, Sequences(
            length=decodes_from,
            num_pages=slots.capacity[rows].astype(np.int64) // page_size,
            num_prompt_tokens=decodes_from - length,
            num_steps=np.maximum(end - decodes_from, 0),
            leaf=self._running.prefixes.leaf[rows].astype(np.int64),
        )

    def _candidate_rows(self, candidates: Rows[Candidate]) -> tuple[Sequences, Forest]:
        """Each candidate that does not run yet, followed by its forks; and what these share.

        Pages that others hold are left out: they are theirs.
        """
        page_size = self._page_size
        values: list[tuple[int, ...]] = []
        counts: list[int] = []
        numbers: list[int] = []
        node_pages: list[int] = []
        for sequence, num_tokens, num_held, num_forks in candidates:
            message, group = sequence.request.message, sequence.request.length_group
            length = len(sequence.prompt_ids)
            num_full, rest = divmod(length, page_size)
            if num_tokens == 0:
                num_held = num_full
            num_full -= num_held
            length -= num_held * page_size
            num_pages = num_full + (rest > 0)
            leaf = -1
            if num_tokens and num_forks and num_full:
                leaf = len(node_pages)
                node_pages.append(num_full)
            limit = message.max_tokens
            if num_tokens:
                num_stored = sequence.num_stored
                values.append((length, num_pages, num_tokens, leaf, group, num_stored, limit))
                counts.append(1)
                numbers.append(sequence.order)
            if num_forks:
                values.append((length, num_pages, 0, leaf, group, 0, limit))
                counts.append(num_forks)
                numbers += range(sequence.order + 1, sequence.order + 1 + num_forks)
        # The head is at most of middle length: where few run, one that happens to be predicted long would
        # hold up everybody behind it. An odd number is a long one, and 1 is the middle.
        if numbers and numbers[0] & 1:
            numbers[0] = 1
        columns = np.repeat(np.array(values, np.int64).reshape(-1, 7), counts, axis=0).T
        lengths, pages, tokens, leaves, groups, stored, limits = columns
        predicted = self._predict(groups, stored, limits, np.array(numbers, np.int64))
        forest = Forest(np.full(len(node_pages), -1, np.int32), np.array(node_pages, np.int32))
        return Sequences(lengths, pages, tokens, predicted - stored - 1, leaves), forest

    def _predict(
        self,
        groups: IntArray,
        num_generated: Int64Array,
        max_tokens: IntArray,
        numbers: Int64Array,
    ) -> Int64Array:
        limits = max_tokens.astype(np.int64)
        if not self._config.predict_lengths:
            return limits
        num_running = max(1, int(np.count_nonzero(self._slots.order >= 0)))
        return self._lengths.predict(groups, num_generated, limits, numbers, num_running)

    def _whole_forecast(self, running: Sequences, candidates: Rows[Candidate]) -> Forecast:
        prefixes = self._running.prefixes
        waiting, forest = self._candidate_rows(candidates)
        # The nodes of those who wait come after those of the ones who run.
        np.add(waiting.leaf, len(prefixes.parent), out=waiting.leaf, where=waiting.leaf >= 0)
        return self._forecast(
            running=running,
            waiting=waiting,
            forest=Forest(
                np.concatenate([prefixes.parent, forest.parent]),
                np.concatenate([prefixes.end_column, forest.end_column]),
            ),
        )

    def _forecast(
        self,
        running: Sequences = _NOBODY,
        waiting: Sequences = _NOBODY,
        forest: Forest = _NO_FOREST,
        others: Int64Array = _NOTHING,
        num_unfed: int = 0,
    ) -> Forecast:
        # The batch that is being planned feeds prompts, and its decode rows are counted already: this is
        # step 0, while the forecast's first prompts are fed in step 1.
        return Forecast(
            running,
            waiting,
            forest,
            page_size=self._page_size,
            prefill_rate=self._prefill_rate,
            others=others,
            num_tokens_before=num_unfed - self._prefill_rate,
        )

    def _largest(self, candidate: Candidate) -> int:
        """Pages of a candidate and its forks, if all became as long as they may."""
        each = -(-candidate.sequence.final_length // self._page_size)
        return each * candidate.num_rows

    def _most_pages(self, sequences: Sequences) -> int:
        """The pages that these hold in the end, all together."""
        ends = -(-(sequences.length + sequences.num_steps) // self._page_size)
        return int(np.maximum(ends, sequences.num_pages).sum())

    def _observe(self) -> None:
        """Tells the predictor who ended since the last time."""
        if self._ended:
            self._lengths.observe(*np.array(self._ended, np.int64).T)
        if self._aborted:
            self._lengths.abort(np.array(self._aborted, np.int64))
        self._ended.clear()
        self._aborted.clear()

    def _judge(self) -> None:
        """Counts by how much the use of pages is not what it was said to be."""
        if not 0 < self._now - self._refreshed_at <= 2 * REFRESH_INTERVAL:
            return
        self._apply_patches()
        num_used = self._num_pages - self._running.pages.num_available - self._num_planned_pages()
        self._counters.num_forecasts += 1
        self._counters.num_forecast_pages_off += abs(num_used - int(self._coming()[0]))

    def _num_planned_pages(self) -> int:
        """Own pages of sequences whose tokens are all planned."""
        slots = self._slots
        rows = ((slots.length == slots.final_length) & (slots.order >= 0)).nonzero()[0]
        num_shared = self._running.prefixes.num_shared_pages(rows)
        return int((slots.capacity[rows] // self._page_size - num_shared).sum())

    def _coming(self) -> Int64Array:
        """Pages at each step from now on, without the patches."""
        coming = self._use[self._now - self._use_from :]
        return coming if len(coming) else _NOTHING

    def _patch_use(self, patch: _Patch) -> Int64Array:
        forecast = self._forecast(patch.sequences, forest=patch.forest, num_unfed=patch.num_unfed)
        return forecast.use()

    def _apply_patches(self) -> None:
        """Brings the use of pages up to date with who was admitted, and who ended."""
        if not self._patches:
            return
        added = [(patch, self._patch_use(patch)) for patch in self._patches]
        coming = self._coming()
        total: Int64Array = np.zeros(max(len(coming), *(len(use) for _, use in added)), np.int64)
        total[: len(coming)] = coming
        for patch, use in added:
            later = use[self._now - patch.step :]
            total[: len(later)] += patch.sign * later
        self._use, self._use_from = total, self._now
        self._most_used = int(total.max())
        self._patches.clear()
