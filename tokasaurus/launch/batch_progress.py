"""The progress of ``toka-batch`` on standard error."""

from __future__ import annotations

import datetime
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from tokasaurus.batch.offline import JobProgress
from tokasaurus.batch.prices import Prices

__all__ = ["ProgressDisplay"]

# Seconds between lines of progress if there is no terminal: few enough for a log of a whole night.
_FIRST_LINES_S, _LATER_LINES_S = 10.0, 60.0
_LATER_AFTER_S = 300.0
_MANY_LINES = 100


class ProgressDisplay:
    """Progress on standard error: a bar on a terminal, otherwise a line from time to time.

    Args:
        prices: of tokens; None if no cost is to be shown.
    """

    def __init__(self, prices: Prices | None = None) -> None:
        self._prices = prices
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[more]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("loading the model", total=None, more="")
        # Time of the first call, and the lines and tokens of earlier runs.
        self._begun: tuple[float, int, int] | None = None
        self._next_line_at = 0.0

    def __enter__(self) -> ProgressDisplay:
        self._progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if not self._progress.disable:  # rich 13 would print an empty line
            self._progress.stop()

    def begin(self) -> None:
        """Says that the model is being loaded."""
        self._say("loading the model")

    def show(
        self, progress: JobProgress, forecast_s: float | None, *, is_whole: bool = False
    ) -> None:
        """Shows how far the job is.

        Args:
            progress: of the job.
            forecast_s: when it will be done, by a forecast; None if there is none.
            is_whole: whether the forecast knows all lines that are left. Otherwise the pace of many
                lines says more than a forecast for some.
        """
        now, counts, num_tokens = time.monotonic(), progress.counts, progress.usage.output_tokens
        answered = progress.num_answered
        if self._begun is None:
            self._begun = now, answered, num_tokens
        began, lines_before, tokens_before = self._begun
        seconds = max(now - began, 1e-9)
        num_new = answered - lines_before
        eta_s = forecast_s
        if num_new and (forecast_s is None or (num_new >= _MANY_LINES and not is_whole)):
            eta_s = seconds * max(0, counts.total - answered) / num_new
        status = progress.status + (f", {counts.failed} failed" if counts.failed else "")
        parts = [f"{(num_tokens - tokens_before) / seconds:,.0f} tokens/s"]
        if progress.files is not None:
            parts.insert(0, "{} of {} files".format(*progress.files))
        if self._prices is not None:
            parts.append(f"cost {self._prices.shown(progress.usage)}")
        if eta_s is not None and not progress.is_final:
            parts.append(f"about {datetime.timedelta(seconds=round(eta_s))} left")
        self._progress.update(
            self._task,
            description=status,
            completed=answered,
            total=counts.total or None,
            more=", ".join(parts),
        )
        if now >= self._next_line_at or progress.is_final:
            is_late = seconds >= _LATER_AFTER_S
            self._next_line_at = now + (_LATER_LINES_S if is_late else _FIRST_LINES_S)
            about = "about " if progress.is_estimate else ""
            total = f"{about}{counts.total}" if counts.total else "?"
            done = f"{answered} of {total} lines"
            self._say(", ".join([status, done, *parts]))

    def _say(self, line: str) -> None:
        if not self._console.is_terminal:
            print(f"toka-batch: {line}", file=sys.stderr, flush=True)
