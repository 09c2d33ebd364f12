"""The use of pages at each coming step, kept up to date between two forecasts of everything.

A forecast of all running sequences is made once in a while. In between, the curve is patched: a
sequence that is admitted adds the pages that it will need, one that ends takes away those that it
would have needed from then on::

    pages
    ─────────────────────────────────────────── limit
             ┌┄┄┄┄┄┄┄┄┄┄┄┄┄┄┐                    ┄┄ with a sequence that was admitted since
         ╭───╯    ╭──╮       ┆                   ── what the refresh found
    ─────╯        ┆  ╰───────╰────────╮
         now                          ╰───────── step

Knows rows of the forecast and steps, and nothing of where they come from.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tokasaurus.manager.forecast.curve import Forecast, ForecastRows, Forest
from tokasaurus.protocol.arrays import Int64Array

__all__ = ["UseCurve"]

_UNUSED: Int64Array = np.zeros(1, np.int64)  # no page in this step, nor later
_NO_ROWS = ForecastRows.none()
_NO_FOREST = Forest.none()


class _Patch(NamedTuple):
    """What changed since the curve was last brought up to date."""

    step: int  # when
    rows: ForecastRows  # the sequences, as they were then
    forest: Forest  # what they share with one another
    num_unfed: int  # prompt tokens that were fed before theirs
    sign: int  # 1: they were admitted, -1: they ended


class UseCurve:
    """Pages at each step from the last forecast on, and the patches to it.

    Attributes:
        prefill_rate: prompt tokens per step that every forecast assumes.
        most_used: an upper bound of the curve, as if nothing had ended since it was brought up to
            date.

    Args:
        page_size: tokens.
        prefill_rate: until another one is set.
    """

    def __init__(self, page_size: int, prefill_rate: int) -> None:
        self.prefill_rate = prefill_rate
        self.most_used = 0
        self._page_size = page_size
        self._pages = _UNUSED
        self._first_step = 0  # of `_pages`
        self._patches: list[_Patch] = []

    def forecast(
        self,
        running: ForecastRows = _NO_ROWS,
        waiting: ForecastRows = _NO_ROWS,
        forest: Forest = _NO_FOREST,
        others: Int64Array = _UNUSED,
        num_unfed: int = 0,
    ) -> Forecast:
        """A forecast from the present step on.

        Args:
            running: sequences that hold pages.
            waiting: sequences that might be admitted.
            forest: which pages they share.
            others: [steps] pages that are used besides.
            num_unfed: prompt tokens that are fed before all of theirs.
        """
        # The batch that is being planned feeds prompts, and its decode rows are counted already. So
        # it is step 0, while the forecast's first prompts are fed in step 1.
        return Forecast(
            running,
            waiting,
            forest,
            page_size=self._page_size,
            prefill_rate=self.prefill_rate,
            others=others,
            num_tokens_before=num_unfed - self.prefill_rate,
        )

    def renew(self, pages: Int64Array, step: int) -> None:
        """The curve is this one, from the given step on; patches made so far are forgotten."""
        self._pages, self._first_step = pages, step
        self.most_used = int(pages.max()) if len(pages) else 0
        self._patches.clear()

    def add(self, rows: ForecastRows, forest: Forest, num_unfed: int, step: int) -> None:
        """These sequences were admitted, and will use pages from this step on."""
        self._patches.append(_Patch(step, rows, forest, num_unfed, 1))
        self.most_used += rows.most_pages(self._page_size)

    def remove(self, rows: ForecastRows, step: int) -> None:
        """These sequences ended, and will not use the pages that they would have used."""
        self._patches.append(_Patch(step, rows, _NO_FOREST, 0, -1))

    def bring_up_to_date(self, step: int) -> None:
        """Applies the patches."""
        if not self._patches:
            return
        changes = [
            self.forecast(patch.rows, forest=patch.forest, num_unfed=patch.num_unfed).use()
            for patch in self._patches
        ]
        coming = self.coming(step)
        total: Int64Array = np.zeros(max(len(coming), *map(len, changes)), np.int64)
        total[: len(coming)] = coming
        for patch, change in zip(self._patches, changes, strict=True):
            later = change[step - patch.step :]
            total[: len(later)] += patch.sign * later
        self.renew(total, step)

    def coming(self, step: int) -> Int64Array:
        """Pages at each step from this one on, without the patches."""
        coming = self._pages[step - self._first_step :]
        return coming if len(coming) else _UNUSED
