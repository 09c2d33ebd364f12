"""Runs parts of ``make gpu-check`` in processes of their own, several at a time.

A kernel that reads beyond its memory ends everything that its process has on the device, and a
kernel that hangs never returns. So each part has a process, which is ended when time is up, and
the other parts go on. What it prints comes when it has ended, in one piece.

    python gpu_jobs.py JOB OUTCOME

runs the job that the file JOB holds. Both files are pickled, which engines never do: here both ends
are this program, and the directory of the files is private to it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokasaurus.errors import ConfigError

__all__ = ["Job", "Outcome", "run_here", "run_in_processes"]

_LOOK_S = 0.05
_LAST_LINES = 15
# To say what it has found so far.
_TERM_S = 3.0


@dataclass(frozen=True)
class Job:
    """A part of the check.

    Attributes:
        name: of it, which no other one has.
        function: of a module in this directory.
        arguments: of the function. They can be pickled, and so can what it returns.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a job has ended.

    Attributes:
        value: that the function returned.
        error: why it did not; None if it did.
        has_run: False if the engine said that it cannot run so, or time was up.
    """

    value: Any = None
    error: str | None = None
    has_run: bool = True


def run_here(jobs: Iterable[Job]) -> Iterator[tuple[Job, Outcome]]:
    """Runs jobs in this process, one after the other."""
    for job in jobs:
        yield job, _called(job)


def run_in_processes(
    jobs: Iterable[Job], at_once: int, is_late: Callable[[], bool]
) -> Iterator[tuple[Job, Outcome]]:
    """Runs jobs, and yields them as they end.

    Args:
        jobs: in the order in which they begin.
        at_once: as many at most.
        is_late: whether time is up. Jobs that run then are ended.
    """
    waiting, running = deque(jobs), list[_Process]()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        try:
            while waiting or running:
                time_is_up = is_late()
                while waiting and time_is_up:
                    late = Outcome(error="there was no time for it", has_run=False)
                    yield waiting.popleft(), late
                while waiting and len(running) < at_once:
                    job = waiting.popleft()
                    running.append(_Process(job, Path(tempfile.mkdtemp(dir=directory))))
                for each in [each for each in running if time_is_up or each.has_ended]:
                    running.remove(each)
                    yield each.job, each.outcome()
                time.sleep(_LOOK_S)
        finally:
            for each in running:
                each.signal(signal.SIGTERM)
            for each in running:
                each.end()


class _Process:
    """A job that runs in a process."""

    def __init__(self, job: Job, directory: Path) -> None:
        self.job = job
        self._started = time.monotonic()
        self._result, self._log = directory / "outcome", directory / "log"
        (directory / "job").write_bytes(pickle.dumps(job))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-u", __file__, str(directory / "job"), str(self._result)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def outcome(self) -> Outcome:
        """Ends the process if it runs, and prints what it has printed."""
        was_running = not self.has_ended
        self.end()
        seconds = time.monotonic() - self._started
        printed = self._log.read_text(errors="replace").splitlines()
        print(f"-- {self.job.name}: {seconds:.0f} s", flush=True)
        for line in printed:
            print(f"   {line}", flush=True)
        if self._result.exists():
            outcome: Outcome = pickle.loads(self._result.read_bytes())
            return outcome
        if was_running:
            late = f"it was ended after {seconds:.0f} s, when time was up"
            return Outcome(error=late, has_run=False)
        last = "\n".join(printed[-_LAST_LINES:])
        status = self._process.returncode
        return Outcome(error=f"its process ended with status {status}:\n{last}")

    def end(self) -> None:
        """Ends the process, and what it has started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            self.signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_TERM_S)

    def signal(self, number: int) -> None:
        # The group is there for as long as any of them is.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def _called(job: Job) -> Outcome:
    try:
        return Outcome(job.function(*job.arguments))
    except ConfigError as error:
        return Outcome(error=str(error), has_run=False)
    except Exception as error:
        traceback.print_exc()
        return Outcome(error=f"{type(error).__name__}: {error}")


def _main(job: str, result: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    outcome = _called(pickle.loads(Path(job).read_bytes()))
    written = Path(f"{result}.part")
    written.write_bytes(pickle.dumps(outcome))
    written.replace(result)


if __name__ == "__main__":
    # By the name under which the other process knows its classes.
    import gpu_jobs

    gpu_jobs._main(*sys.argv[1:])
