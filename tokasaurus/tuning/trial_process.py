"""The owner of a trial's process: it waits no longer than agreed, and leaves nothing running."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

import tokasaurus
from tokasaurus.tuning.trial import Task

__all__ = ["Measured", "environment", "run_trial"]

_END_S = 5.0  # that a process which has answered everything may take to end
_TAIL_LINES = 4


@dataclass(frozen=True)
class Measured:
    """What a trial found.

    Attributes:
        seconds: of each run.
        tokens: that each run generated.
        ready_s: until the engine had loaded.
        problem: why there are no, or not all, runs; "" if there are.
        is_late: whether the problem is that it took too long.
        other_work: the share of the cores that others took during one of the runs, at most.
    """

    seconds: tuple[float, ...] = ()
    tokens: int = 0
    ready_s: float = 0.0
    problem: str = ""
    is_late: bool = False
    other_work: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Of the fastest run, since whatever disturbs a run makes it slower; 0 without runs."""
        return self.tokens / min(self.seconds) if self.seconds else 0.0


def run_trial(task: Task, ready_s: float, run_s: float) -> Measured:
    """Runs an engine in a process of its own, which has ended when this returns or raises.

    Args:
        task: what to run.
        ready_s: for loading the engine.
        run_s: for each of its runs.
    """
    with tempfile.TemporaryFile() as log, _process(log) as process:
        lines = _lines(process)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the log says why
            process.stdin.write(msgspec.json.encode(task) + b"\n")
            process.stdin.flush()
        loaded_s, limit_s = 0.0, ready_s
        while True:
            try:
                line = lines.get(timeout=limit_s)
            except queue.Empty:
                what = "had not run the workload" if loaded_s else "was not ready"
                problem = f"{what} after {limit_s:.0f} s"
                return Measured(ready_s=loaded_s, problem=problem, is_late=True)
            if line is None or "error" in line:
                problem = _reason(process, log) if line is None else str(line["error"])
                return Measured(ready_s=loaded_s, problem=problem)
            if "ready" in line:
                loaded_s, limit_s = line["ready"], run_s
            elif "seconds" in line:
                return Measured(
                    tuple(line["seconds"]), line["tokens"], loaded_s, other_work=line["other_work"]
                )


@contextlib.contextmanager
def _process(log: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A trial's process, and its end.

    It has a session of its own, so that Ctrl-C reaches its owner alone. If the owner is killed,
    the process sees the end of its input.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "tokasaurus.tuning.trial"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment(),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process, and those that it has started."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)
    # Processes of an engine with several workers end with their supervisor. If one hangs, it is
    # still in the session.
    until = time.monotonic() + _END_S
    while _signal(process, signal.SIGTERM if time.monotonic() < until else signal.SIGKILL):
        if time.monotonic() > until + _END_S:
            break
        process.poll()
        time.sleep(0.05)
    process.wait()
    process.stdout.close()


def _signal(process: subprocess.Popen[bytes], number: int) -> bool:
    """Sends a signal to the session; returns whether it had a process."""
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _lines(process: subprocess.Popen[bytes]) -> queue.Queue[dict[str, Any] | None]:
    """What the process answers, as it comes; None is its end."""
    lines: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(msgspec.json.decode(line))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _reason(process: subprocess.Popen[bytes], log: Any) -> str:
    status = process.wait()
    log.seek(0)
    tail = log.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
    return f"ended with status {status}: {' | '.join(tail)}"


def environment() -> dict[str, str]:
    """Of a program of ours: the engine may run from a checkout."""
    here = str(Path(tokasaurus.__file__).parent.parent)
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}
