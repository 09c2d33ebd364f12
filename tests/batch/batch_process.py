"""A process that answers the batches of a directory, without an engine, for tests to kill.

    python batch_process.py DIRECTORY [CRASH AFTER]

Ends by itself when no batch is unfinished; or, if CRASH names a function of ``CRASHES``, dies as if killed right
after its call number AFTER.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokasaurus.batch import runner as runner_module
from tokasaurus.batch import store as store_module
from tokasaurus.batch.runner import BatchRunner
from tokasaurus.batch.store import JobStore

URL = "/v1/completions"
CRASHES = {
    "answers are on the disk, not committed": (store_module, "_write_at"),
    "answers are committed": (store_module.JobStore, "record"),
    "results are written, the batch is not finished": (runner_module, "write_results"),
    "the batch is finished, its answers not deleted": (store_module.JobStore, "_change"),
    "the file is checked, nothing is noted": (runner_module, "validate"),
}


async def answer(path: str, body: Any, *, priority: int) -> tuple[int, bytes]:
    """An echo that takes a moment; every tenth is an error."""
    await asyncio.sleep(random.random() * 0.1)
    number = body["number"]
    usage = {"prompt_tokens": 1, "completion_tokens": number}
    return 400 if number % 10 == 9 else 200, json.dumps({"echo": number, "usage": usage}).encode()


async def run(directory: Path) -> None:
    store = JobStore(directory)
    runner = BatchRunner(store, answer, urls=[URL], model="echo", max_samples=64)
    await runner.start()
    for batch_id in await runner.on_disk(store.unfinished_batches):
        await runner.wait(batch_id)
    await runner.close()


def crash_after(owner: Any, name: str, number: int) -> None:
    function: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        result = function(*args, **kwargs)
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        crash_after(*CRASHES[sys.argv[2]], int(sys.argv[3]))
    asyncio.run(run(Path(sys.argv[1])))
