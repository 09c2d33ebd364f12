"""A process without an engine that answers the batches of a directory, for tests to kill.

    python echo_process.py DIRECTORY [MOMENT]

It exits when no batch is unfinished. MOMENT makes it die earlier, as if it were killed: at a moment
of ``CRASHES``, or after a number of seconds.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokasaurus.batch import runner as runner_module
from tokasaurus.batch import store as store_module
from tokasaurus.batch.runner import BatchRunner
from tokasaurus.batch.store import JobStore

URL = "/v1/completions"
MAX_ANSWER_S = 0.1
MAX_SAMPLES = 64


@dataclass(frozen=True)
class Crash:
    """A function that has just been called for the nth time, or is about to be.

    Attributes:
        status: of the batch at this moment.
    """

    owner: Any
    name: str
    number: int
    status: str
    before: bool = False


# Of a batch of 100 lines, the first record has the bad ones, and the answers to the others need two
# more at least: only MAX_SAMPLES lines are in flight, each until its answer is recorded.
CRASHES = {
    "answers are on the disk but not committed": Crash(store_module, "_write_at", 3, "in_progress"),
    "answers are committed": Crash(JobStore, "record", 3, "in_progress"),
    "results are written but the batch is not finished": Crash(
        runner_module, "write_results", 1, "finalizing"
    ),
    "the batch is finished but its answers are not deleted": Crash(
        Path, "unlink", 1, "completed", before=True
    ),
    "the file is checked but nothing is recorded": Crash(
        runner_module, "validate", 1, "validating"
    ),
}


async def answer(path: str, body: Any, *, priority: int) -> tuple[int, bytes]:
    """Echoes a number after a moment; every tenth number gets an error."""
    await asyncio.sleep(random.random() * MAX_ANSWER_S)
    number = body["number"]
    usage = {"prompt_tokens": 1, "completion_tokens": number}
    return 400 if number % 10 == 9 else 200, json.dumps({"echo": number, "usage": usage}).encode()


def echo_runner(directory: Path) -> BatchRunner:
    """A runner that answers with echoes."""
    return BatchRunner(
        JobStore(directory), answer, urls=[URL], model="echo", max_samples=MAX_SAMPLES
    )


async def run(directory: Path) -> None:
    """Answers every unfinished batch of the directory."""
    runner = echo_runner(directory)
    await runner.start()
    for batch_id in await runner.on_disk(runner.store.unfinished_batches):
        await runner.wait(batch_id)
    await runner.close()


def crash_at(moment: Crash) -> None:
    """Replaces the function by one that kills the process then."""
    function: Callable[..., Any] = getattr(moment.owner, moment.name)
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if moment.before and calls == moment.number:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if calls == moment.number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(moment.owner, moment.name, wrapped)


def main(directory: str, moment: str = "") -> None:
    if moment in CRASHES:
        crash_at(CRASHES[moment])
    elif moment:
        signal.setitimer(signal.ITIMER_REAL, float(moment))  # no handler: SIGALRM ends the process
    asyncio.run(run(Path(directory)))


if __name__ == "__main__":
    main(*sys.argv[1:])
