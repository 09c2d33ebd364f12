"""Runs the parts of a benchmark that need no quiet machine in several processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

__all__ = ["in_processes"]

Task = TypeVar("Task")
Result = TypeVar("Result")


def in_processes(
    function: Callable[[Task], Result], tasks: Sequence[Task], jobs: int | None
) -> Iterator[tuple[Task, Result]]:
    """Calls a function for each task; yields tasks and results as they end.

    Args:
        function: of a module, so that another process finds it.
        tasks: that can be pickled.
        jobs: how many run at the same time; None for one on each core.
    """
    num_workers = min(jobs or os.cpu_count() or 1, len(tasks))
    if num_workers == 1:
        for task in tasks:
            yield task, function(task)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        futures = {pool.submit(function, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
