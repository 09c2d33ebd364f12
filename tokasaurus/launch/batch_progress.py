"""The progress of ``toka-batch`` on standard error."""

from __future__ import annotations

import datetime
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from tokasaurus.batch.records import RequestCounts, Usage

__all__ = ["ProgressDisplay"]

_LINE_S = 10.0  # between lines of progress if there is no terminal


class ProgressDisplay:
    """Progress on standard error: a bar on a terminal, otherwise a line from time to time."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TextColumn("{task.fields[eta]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("loading the model", total=None, speed="", eta="")
        # Time of the first call, and the tokens of earlier runs.
        self._begun: tuple[float, int] | None = None
        self._next_line_at = 0.0

    def __enter__(self) -> ProgressDisplay:
        self._progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._progress.stop()

    def show(
        self, status: str, counts: RequestCounts, usage: Usage, eta_s: float | None, *, final: bool
    ) -> None:
        """Shows the present state.

        Args:
            status: in a word or two.
            counts: of lines; a total of 0 is not known yet.
            usage: the tokens of all answered lines.
            eta_s: when all will be answered; None if that is not known.
            final: whether this is the last call.
        """
        now, num_tokens = time.monotonic(), usage.output_tokens
        if self._begun is None:
            self._begun = now, num_tokens
        seconds = max(now - self._begun[0], 1e-9)
        speed = f"{(num_tokens - self._begun[1]) / seconds:,.0f} tokens/s"
        eta = "" if eta_s is None else f"about {datetime.timedelta(seconds=round(eta_s))} left"
        answered = counts.completed + counts.failed
        status += f", {counts.failed} failed" if counts.failed else ""
        self._progress.update(
            self._task,
            description=status,
            completed=answered,
            total=counts.total or None,
            speed=speed,
            eta=eta,
        )
        if not self._console.is_terminal and (now >= self._next_line_at or final):
            self._next_line_at = now + _LINE_S
            done = f"{answered}/{counts.total or '?'} lines"
            line = ", ".join(part for part in (status, done, speed, eta) if part)
            print(f"toka-batch: {line}", file=sys.stderr, flush=True)
