"""How many KV pages will be in use at each coming step, and what follows from that.

Owns one model of the future. Every function here answers by it, exactly unless it says otherwise.
Knows nothing of slots, requests or queues, and takes predicted lengths as they are.

The model, for pages of P tokens. Step 0 is now; no sequence arrives later, none is preempted.

- A sequence that decodes fills one position per step, for ``num_steps`` steps, and frees its pages
  after the last. It takes a page in a step in which it fills a position that is in none of its
  pages::

      P = 4, length 6, 2 pages, num_steps 5, so that it ends in step 5

      position   0 1 2 3   4 5 6 7   8 9 10
      step       ▪ ▪ ▪ ▪   ▪ ▪ 1 2   3 4 5      pages in use at step 0 .. 6:  2 2 2 3 3 3 0

- Prompts are fed one after the other, ``prefill_rate`` tokens per step: those of running sequences
  first, in the order of their rows, then those of admitted ones. A prompt is fed in the step in
  which the tokens fed so far reach its end; its sequence decodes from the next step on.
- Waiting sequences are admitted now, in the order of their rows, and hold all pages of their prompt
  from step 0 on.
- Pages that several sequences hold are nodes of a forest, see ``shared_prefixes``. A node is in use
  until the last of its holders ends. Waiting sequences that find cached pages hold them from their
  admission on, whether the pages have other holders or none.

Use falls only where a sequence ends. All results are sums over sequences, and a waiting sequence
adds the same pages however many are admitted behind it. So use with m admitted sequences is a
running sum over m, which never falls with m, and the largest m that fits is found by bisection.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from tokasaurus.manager.slots import IndexArray
from tokasaurus.protocol.arrays import EMPTY_INT32, EMPTY_INT64, Int32Array, Int64Array
from tokasaurus.rounding import ceil_div, round_up

__all__ = ["Expected", "Forecast", "ForecastRows", "Forest"]


@dataclass(frozen=True, eq=False, slots=True)
class ForecastRows:
    """Sequences in the order in which their prompts are fed, in columns.

    Attributes:
        length: [n] positions that are filled when the sequence decodes its first token of this
            forecast: those filled now if it decodes already, else those of its whole prompt.
        num_pages: [n] pages it holds, including those in the forest; from its admission on if it
            waits.
        num_prompt_tokens: [n] tokens of its prompt that must be fed before it decodes; 0 if it
            decodes.
        num_steps: [n] tokens that it then decodes, as predicted. The last token of a sequence is
            not fed, so after a prompt this is one less than the tokens to come.
        leaf: [n] the node of the forest that ends its shared pages; -1 for none.
    """

    length: Int64Array
    num_pages: Int64Array
    num_prompt_tokens: Int64Array
    num_steps: Int64Array
    leaf: Int64Array

    def __len__(self) -> int:
        return len(self.length)

    def __getitem__(self, rows: slice) -> ForecastRows:
        return ForecastRows(
            self.length[rows],
            self.num_pages[rows],
            self.num_prompt_tokens[rows],
            self.num_steps[rows],
            self.leaf[rows],
        )

    @classmethod
    def none(cls) -> ForecastRows:
        """No sequences."""
        return cls(EMPTY_INT64, EMPTY_INT64, EMPTY_INT64, EMPTY_INT64, EMPTY_INT64)

    def most_pages(self, page_size: int) -> int:
        """The pages that these sequences hold at their ends, all together."""
        ends = ceil_div(self.length + self.num_steps, page_size)
        return int(np.maximum(ends, self.num_pages).sum())


@dataclass(frozen=True, eq=False, slots=True)
class Forest:
    """Runs of pages that sequences share: the columns of ``SharedPrefixes``, or copies of them.

    Entries without a holder may have any value in range. The cached pages of a waiting sequence are
    in the forest too, as if it ran; a node that only waiting sequences hold is in use once one is
    admitted.

    Attributes:
        parent: [nodes] -1 at the top.
        end_column: [nodes] pages of the node and of all ancestors.
    """

    parent: Int32Array
    end_column: Int32Array

    @classmethod
    def none(cls) -> Forest:
        """Nothing is shared."""
        return cls(EMPTY_INT32, EMPTY_INT32)


@dataclass(frozen=True, eq=False, slots=True)
class Expected:
    """What happens if all waiting sequences run as soon as there is room.

    Attributes:
        running_ends: [running] the step in which each ends.
        waiting_starts: [waiting] the step in which each is admitted.
        waiting_ends: [waiting] the step in which each ends.
        running_pages: [steps] pages in use by running sequences.
        all_pages: [steps] pages in use, up to the last end.
    """

    running_ends: Int64Array
    waiting_starts: Int64Array
    waiting_ends: Int64Array
    running_pages: Int64Array
    all_pages: Int64Array


class Forecast:
    """The future of some running and waiting sequences.

    Work and memory grow with the number of steps until the last end.

    Args:
        running: sequences that hold pages.
        waiting: sequences that might be admitted.
        forest: which pages they share.
        page_size: tokens.
        prefill_rate: prompt tokens per step, 1 or more.
        others: [steps] pages that other sequences use at each step.
        num_tokens_before: prompt tokens of other sequences that are fed first.
    """

    def __init__(
        self,
        running: ForecastRows,
        waiting: ForecastRows,
        forest: Forest,
        *,
        page_size: int,
        prefill_rate: int,
        others: Int64Array = EMPTY_INT64,
        num_tokens_before: int = 0,
    ) -> None:
        self._parent = forest.parent
        self._end_column = np.append(forest.end_column, 0)  # also where there is no node
        self._node_pages = forest.end_column.astype(np.int64) - self._end_column[forest.parent]
        self._page_size = page_size
        self._prefill_rate = prefill_rate
        self._running = running
        self._waiting = waiting
        num_tokens = int(running.num_prompt_tokens.sum())
        self._running_lives = self._lives(running, num_tokens_before)
        self._waiting_lives = self._lives(waiting, num_tokens_before + num_tokens)
        self._node_end = self._last_ends(running, self._running_lives)
        self._horizon = max(self._running_lives.horizon(), len(others))
        self._base = self._running_use()
        self._base[: len(others)] += others

    @property
    def running_ends(self) -> Int64Array:
        """[running] the step in which each running sequence ends."""
        return self._running_lives.end

    def use(self, num_admitted: int = 0) -> Int64Array:
        """Pages in use at step 0, 1, .. up to the last end, with the first waiting sequences."""
        lives = self._waiting_lives[:num_admitted]
        use = _extended(self._base, self._size(lives.horizon()))
        use += self._added_use(lives, self._node_spans(num_admitted), len(use))
        return use[: max(self._horizon, lives.horizon())]

    def peak(self, num_admitted: int = 0) -> int:
        """The most pages in use at any step, with the first waiting sequences."""
        return int(self.use(num_admitted).max(initial=0))

    def num_admissible(self, limit: int) -> int:
        """How many waiting sequences, from the first on, may be admitted within ``limit`` pages.

        It is also 0 where the running sequences alone exceed the limit. The caller decides what to
        do with a sequence that does not even fit alone.
        """
        peak = int(self._base.max(initial=0))
        lives = self._waiting_lives
        if peak > limit or not len(lives):
            return 0
        # Bounds from sums: the pages that are held at once must fit now. Sequences that would fit
        # if they all had their most pages at the same time, and shared none, fit in any case.
        held = np.cumsum(lives.num_held) + self._base[0]
        high = int(np.searchsorted(held, limit, side="right"))
        most = np.cumsum(self._waiting.num_pages[:high] + lives.num_taken[:high]) + peak
        low = int(np.searchsorted(most, limit, side="right"))
        if low == high:
            return low
        spans = self._node_spans(high)
        size = self._size(lives[:high].horizon())
        use = _extended(self._base, size)
        use += self._added_use(lives[:low], spans.of(0, low), size)
        count = high
        while low < high:
            trial = self._added_use(lives[low:count], spans.of(low, count), size)
            trial += use
            step = int(trial.argmax())
            width = high - low
            if trial[step] <= limit:
                low, use = count, trial
            else:
                # The number that fits in this step is a cheap upper bound, and most often a close
                # one.
                added = self._added_at(step, lives[low:count], spans.of(low, count), low)
                fitting = np.searchsorted(np.cumsum(added), limit - use[step], side="right")
                high = low + int(fitting)
            count = high if high - low <= width // 2 else (low + high + 1) // 2
        return low

    def finish_steps(self, limit: int) -> tuple[Int64Array, Int64Array]:
        """The step in which each sequence ends.

        Exact for running sequences and for waiting ones that are admissible now. For those behind
        it is an estimate: each holds the pages of its middle age from start to end, and starts as
        soon as those before it leave enough pages.

        Returns:
            [running], [waiting]
        """
        _, _, ends = self._queue(limit)
        return self._running_lives.end, ends

    def expect(self, limit: int) -> Expected:
        """The same as ``finish_steps``, with the starts and the use of pages that go with it."""
        num_admitted, starts, ends = self._queue(limit)
        use = self.use(num_admitted)
        use = _extended(use, max(len(use), int(ends.max(initial=0)) + 2))
        change: Int64Array = np.zeros(len(use), np.int64)
        pages = self._waiting_lives.middle_pages()[num_admitted:]
        np.add.at(change, starts[num_admitted:], pages)
        np.subtract.at(change, ends[num_admitted:] + 1, pages)
        use += np.cumsum(change)
        horizon = max(self._horizon, int(ends.max(initial=-1)) + 1)
        running = self.use()
        return Expected(self._running_lives.end, starts, ends, running, use[:horizon])

    def prefill_pace(
        self, limit: int, budget: int, round_up_multiple: int, catch_up_steps: int = 32
    ) -> int:
        """How many prompt tokens to feed in this step, so that prefill is spread evenly.

        This is the least rate at which prompts never fall behind the pages that come free: all
        prompts that have found room when a sequence ends are fed when the next one ends. Those that
        have room now, or would find it, are due after ``catch_up_steps`` at the latest, since the
        cache has room for them already. It is an estimate: later pages of waiting sequences are not
        counted.

        Args:
            limit: pages.
            budget: the most tokens. ``prefill_rate`` should be the same.
            round_up_multiple: the result is a multiple of it, unless it is ``budget``.
            catch_up_steps: steps.

        Returns:
            0 if there is no prompt to feed; ``budget`` if no sequence decodes.
        """
        num_fed = int(self._running.num_prompt_tokens.sum())
        if not num_fed and not len(self._waiting):
            return 0
        is_decoding = self._running.num_prompt_tokens == 0
        ends = np.unique(self._running_lives.end[is_decoding])
        if not len(ends):
            return budget
        # Room for newcomers now and after each end: pages that running sequences will never need
        # again.
        latest_use = np.maximum.accumulate(self._base[::-1])[::-1]
        room = limit - latest_use[np.append(0, ends[:-1] + 1)]
        fits = np.searchsorted(np.cumsum(self._waiting_lives.num_held), room, side="right")
        tokens = num_fed + np.append(0, np.cumsum(self._waiting.num_prompt_tokens))[fits]
        ends[0] = min(ends[0], catch_up_steps)
        rate = int(ceil_div(tokens, np.maximum(ends, 1)).max())
        return min(round_up(rate, round_up_multiple), budget)

    def _lives(self, rows: ForecastRows, num_tokens_before: int) -> _Lives:
        """When sequences take pages and end; ``num_tokens_before`` others are fed before theirs."""
        is_decoding = rows.num_prompt_tokens == 0
        fed = num_tokens_before + np.cumsum(rows.num_prompt_tokens)
        start = np.where(is_decoding, 0, ceil_div(fed, self._prefill_rate))
        spare = rows.num_pages * self._page_size - rows.length
        leaf_end = self._end_column[rows.leaf]
        return _Lives(
            end=start + rows.num_steps,
            num_held=rows.num_pages - leaf_end,
            first_take=start + spare + 1,
            num_taken=ceil_div(np.maximum(rows.num_steps - spare, 0), self._page_size),
        )

    def _last_ends(self, rows: ForecastRows, lives: _Lives) -> Int64Array:
        """[nodes] the last end among a node's holders; -1 where there are none."""
        last: Int64Array = np.full(len(self._parent), -1, np.int64)
        if not len(last):
            return last
        has_leaf = rows.leaf >= 0
        np.maximum.at(last, rows.leaf[has_leaf], lives.end[has_leaf])
        # In round k every node passes its end to its ancestor 2^k levels up. Some ends arrive
        # twice, which does not change a maximum.
        ancestor = self._parent
        for _ in range(len(last).bit_length()):
            nodes = np.flatnonzero((ancestor >= 0) & (last >= 0))
            np.maximum.at(last, ancestor[nodes], last[nodes])
            ancestor = np.where(ancestor >= 0, ancestor[ancestor], -1)
        return last

    def _running_use(self) -> Int64Array:
        nodes = np.flatnonzero(self._node_end >= 0)
        spans = _Spans(
            order=nodes,
            first=np.zeros(len(nodes), np.int64),
            last=self._node_end[nodes],
            num_pages=self._node_pages[nodes],
        )
        return self._added_use(self._running_lives, spans, self._size(self._horizon))

    def _node_spans(self, num_waiting: int) -> _Spans:
        """The use of nodes that each of the first waiting sequences adds to those before it."""
        if not len(self._parent):
            return _NO_SPANS
        node = self._waiting.leaf[:num_waiting]
        order = np.flatnonzero(node >= 0)
        node = node[order]
        nodes, orders = [node], [order]
        while len(node):
            node = self._parent[node].astype(np.int64)
            has_parent = node >= 0
            node, order = node[has_parent], order[has_parent]
            nodes.append(node)
            orders.append(order)
        node, order = np.concatenate(nodes), np.concatenate(orders)
        by_node = np.argsort(node * num_waiting + order)
        node, order = node[by_node], order[by_node]
        end = self._waiting_lives.end[order]
        # A running maximum in each node: later nodes are lifted above all earlier ones.
        lift = np.cumsum(np.diff(node, prepend=-1) > 0) * (int(end.max(initial=0)) + 2)
        until = np.maximum.accumulate(end + lift) - lift
        until = np.maximum(until, self._node_end[node])
        before = np.where(np.diff(node, prepend=-1) > 0, self._node_end[node], np.roll(until, 1))
        adds = until > before
        in_order = np.argsort(order[adds], kind="stable")
        return _Spans(
            order=order[adds][in_order],
            first=before[adds][in_order] + 1,
            last=until[adds][in_order],
            num_pages=self._node_pages[node[adds][in_order]],
        )

    def _added_use(self, lives: _Lives, spans: _Spans, size: int) -> Int64Array:
        """[size] pages that these sequences use alone, and pages of nodes in these spans."""
        page_size = self._page_size
        change: Int64Array = np.zeros(size, np.int64)
        change[0] = lives.num_held.sum()
        np.subtract.at(change, lives.end + 1, lives.num_held + lives.num_taken)
        np.add.at(change, spans.first, spans.num_pages)
        np.subtract.at(change, spans.last + 1, spans.num_pages)
        # A sequence that takes pages takes one every P steps: a running sum with stride P.
        taking = np.flatnonzero(lives.num_taken)
        first_take, num_taken = lives.first_take[taking], lives.num_taken[taking]
        takes: Int64Array = np.zeros(size, np.int64)
        np.add.at(takes, first_take, 1)
        np.subtract.at(takes, first_take + num_taken * page_size, 1)
        by_stride = takes.reshape(-1, page_size)
        np.cumsum(by_stride, axis=0, out=by_stride)
        change += takes
        return np.cumsum(change, out=change)

    def _added_at(self, step: int, lives: _Lives, spans: _Spans, first_order: int) -> Int64Array:
        """[lives] pages that each adds to one step; the first is number ``first_order``."""
        taken = np.clip((step - lives.first_take) // self._page_size + 1, 0, lives.num_taken)
        added = np.where(step <= lives.end, lives.num_held + taken, 0)
        is_used = (spans.first <= step) & (step <= spans.last)
        np.add.at(added, spans.order[is_used] - first_order, spans.num_pages[is_used])
        return added

    def _size(self, horizon: int) -> int:
        """Steps of an array that covers all that happens before ``horizon`` and just after it."""
        page_size = self._page_size
        horizon = max(horizon, self._horizon)
        return round_up(horizon + page_size + 1, page_size)

    def _queue(self, limit: int) -> tuple[int, Int64Array, Int64Array]:
        """How many may be admitted now; [waiting] starts and ends, see ``finish_steps``."""
        num_admitted = self.num_admissible(limit)
        starts: Int64Array = np.zeros(len(self._waiting), np.int64)
        ends = self._waiting_lives.end.copy()
        if num_admitted < len(self._waiting):
            behind = self._queue_lives(num_admitted, limit)
            starts[num_admitted:], ends[num_admitted:] = behind
        return num_admitted, starts, ends

    def _queue_lives(self, num_admitted: int, limit: int) -> tuple[list[int], list[int]]:
        """Estimated starts and ends of the waiting sequences behind the first ones."""
        admitted = self._waiting_lives[:num_admitted]
        ends = np.concatenate([self._running_lives.end, admitted.end])
        pages = np.concatenate([self._running_lives.middle_pages(), admitted.middle_pages()])
        leaving = list(zip(ends.tolist(), pages.tolist(), strict=True))
        heapq.heapify(leaving)
        in_use = int(pages.sum()) + int(self._node_pages[self._node_end >= 0].sum())
        num_tokens = int(self._running.num_prompt_tokens.sum())
        num_tokens += int(self._waiting.num_prompt_tokens[:num_admitted].sum())
        fed = num_tokens / self._prefill_rate
        now = 0
        if leaving:  # the first of them is not admissible now
            now, freed = heapq.heappop(leaving)
            in_use -= freed
        starts, queue_ends = [], []
        for needed, num_tokens, num_steps in zip(
            self._waiting_lives.middle_pages()[num_admitted:].tolist(),
            self._waiting.num_prompt_tokens[num_admitted:].tolist(),
            self._waiting.num_steps[num_admitted:].tolist(),
            strict=True,
        ):
            while leaving and in_use + needed > limit:
                end, freed = heapq.heappop(leaving)
                now = max(now, end)
                in_use -= freed
            fed = max(fed, now) + num_tokens / self._prefill_rate
            end = int(fed) + 1 + num_steps
            heapq.heappush(leaving, (end, needed))
            in_use += needed
            starts.append(now)
            queue_ends.append(end)
        return starts, queue_ends


@dataclass(frozen=True, eq=False, slots=True)
class _Lives:
    """When sequences take pages and end; pages of the forest are left out.

    Attributes:
        end: [n] the last step in which it holds pages.
        num_held: [n] pages from step 0 on.
        first_take: [n] the step in which it takes its next page, if it takes any.
        num_taken: [n] pages it takes, one every page_size steps.
    """

    end: Int64Array
    num_held: Int64Array
    first_take: Int64Array
    num_taken: Int64Array

    def __len__(self) -> int:
        return len(self.end)

    def __getitem__(self, rows: slice) -> _Lives:
        return _Lives(
            self.end[rows], self.num_held[rows], self.first_take[rows], self.num_taken[rows]
        )

    def horizon(self) -> int:
        """The first step without them."""
        return int(self.end.max(initial=-1)) + 1

    def middle_pages(self) -> Int64Array:
        """[n] pages when half of the pages to take are taken."""
        return self.num_held + (self.num_taken + 1) // 2


@dataclass(frozen=True, eq=False, slots=True)
class _Spans:
    """Steps in which nodes are in use only because of one holder.

    Attributes:
        order: [m] the number of that holder, ascending.
        first: [m] step.
        last: [m] step.
        num_pages: [m]
    """

    order: IndexArray
    first: Int64Array
    last: Int64Array
    num_pages: Int64Array

    def of(self, start: int, stop: int) -> _Spans:
        """The spans of holders start .. stop - 1."""
        low, high = np.searchsorted(self.order, [start, stop])
        return _Spans(
            self.order[low:high],
            self.first[low:high],
            self.last[low:high],
            self.num_pages[low:high],
        )


_NO_SPANS = _Spans(np.empty(0, np.intp), EMPTY_INT64, EMPTY_INT64, EMPTY_INT64)


def _extended(use: Int64Array, size: int) -> Int64Array:
    longer: Int64Array = np.zeros(size, np.int64)
    longer[: len(use)] = use
    return longer
