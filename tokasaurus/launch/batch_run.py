"""``toka-batch run``: answers a file of requests with an engine of its own, without a server.

The engine and its processes are those of ``toka``, with a runner of batches in the place of HTTP.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from tokasaurus.batch.offline import OfflineJob
from tokasaurus.batch.records import Batch
from tokasaurus.batch.runner import BatchRunner
from tokasaurus.config.engine import ENGINE
from tokasaurus.config.parser import answer_question, parse, print_help
from tokasaurus.errors import ConfigError, LaunchError, ModelError
from tokasaurus.launch.batch_progress import ProgressDisplay
from tokasaurus.launch.launching import placed
from tokasaurus.launch.lifeline import Assignment, Done, Lifeline
from tokasaurus.launch.supervisor import Supervisor
from tokasaurus.launch.text_process import TextProcess
from tokasaurus.launch.tracing import close_tracing
from tokasaurus.launch.unused_flags import unused_flags
from tokasaurus.protocol.messages import MAX_PRIORITY
from tokasaurus.server.operations.executor import Executor
from tokasaurus.server.protocols.table import OPERATIONS
from tokasaurus.server.routes.batches import SAMPLES_AHEAD
from tokasaurus.text.generations import Generations
from tokasaurus.text.preparation import Preparer

__all__ = ["main"]

_SCHEMA = dataclasses.replace(
    ENGINE,
    program="toka-batch run INPUT OUTPUT",
    summary="Answer a file of requests without a server.\n\n"
    "If the command is stopped, run it again: it continues where it stopped.\n\n"
    "INPUT has one request per line (JSONL) or row (if its name ends with .parquet): a line of an\n"
    "OpenAI batch, or only its body, with a prompt or messages. OUTPUT, JSONL or Parquet, appears\n"
    "once all requests are answered, in the same order. The flags are those of the engine.\n\n"
    "With launcher=ray, INPUT and OUTPUT may be directories or URLs (s3://BUCKET/PATH): dp_size\n"
    "engines on a Ray cluster answer all files of INPUT.",
    examples=(
        "toka-batch run prompts.jsonl answers.jsonl",
        "toka-batch run in.parquet out.jsonl model=meta-llama/Llama-3.2-1B-Instruct",
        "toka-batch run in_dir out_dir launcher=ray dp_size=16",
    ),
)
_QUIET = "log_level=WARNING"  # unless the command line sets it
_REFRESH_S = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        The exit status: 0 if every line has an answer or an error of its own, 1 if the engine died,
        2 if the command line or a file is wrong, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(words, os.environ)
    except (ConfigError, LaunchError, ModelError) as error:
        print(f"toka-batch: error: {error}", file=sys.stderr)
        return 2


def _run(words: list[str], environment: Mapping[str, str]) -> int:
    if answer_question(words or ["help"], partial(print_help, _SCHEMA)):
        raise SystemExit(0)
    if words[0] != "run":
        raise ConfigError(
            f"{words[0]!r} is not a command; the only one is toka-batch run INPUT OUTPUT"
        )
    names = [word for word in words[1:3] if "=" not in word and not word.startswith("-")]
    flags = [_QUIET, *words[1 + len(names) :]]
    config = parse(_SCHEMA, flags, environment.get("OVERRIDES", ""))
    if len(names) != 2:
        raise ConfigError("name the input and the output: toka-batch run INPUT OUTPUT")
    for name in unused_flags(config, "toka-batch"):
        print(f"toka-batch: warning: {name} has no effect without a server", file=sys.stderr)
    if "://" in names[0] or Path(names[0]).is_dir():
        if config.launcher != "ray":
            raise ConfigError(
                f"{names[0]} is not a file; set launcher=ray, which answers directories of files"
            )
        from tokasaurus.integrations.ray.batches import run_directory

        return run_directory(config, names[0], names[1])
    # Its lines compete with one another only.
    slices, launcher = placed(dataclasses.replace(config, max_request_priority=MAX_PRIORITY))
    job = OfflineJob(Path(names[0]), Path(names[1]), slices.server.model_name)
    run = _BatchRun(job)
    status = Supervisor(slices, None, run.front, launcher).run()
    return run.conclude(status)


class _BatchRun:
    """One run of the command, seen from outside the engine."""

    def __init__(self, job: OfflineJob) -> None:
        self._job = job
        self._last: Batch | None = None

    def front(self, assignment: Assignment, lifeline: Lifeline) -> None:
        """Runs the text core's process."""
        self._last = asyncio.run(_Front(assignment, lifeline, self._job).run())

    def conclude(self, status: int) -> int:
        """Publishes the output, or says how to continue; returns the exit status."""
        batch, job = self._last, self._job
        if batch is None or not batch.final:
            job.store.close()
            done = "" if batch is None else f" after {_answered(batch)} of {_total(batch)} lines"
            print(
                f"toka-batch: stopped{done}; run the same command again to continue",
                file=sys.stderr,
            )
            return status or 130
        if batch.errors is not None:
            for error in batch.errors.data[:10]:
                where = "" if error.line is None else f"line {error.line}: "
                print(f"toka-batch: error: {where}{error.message}", file=sys.stderr)
            job.drop()
            return 2
        job.publish()
        counts, usage = batch.request_counts, batch.usage
        lines = "1 line" if counts.total == 1 else f"{counts.total} lines"
        failed = f", {counts.failed} with an error" if counts.failed else ""
        print(
            f"{job.target}: {lines}{failed}; {usage.input_tokens} prompt tokens,"
            f" {usage.output_tokens} generated",
            file=sys.stderr,
        )
        return 0


def _answered(batch: Batch) -> int:
    return batch.request_counts.completed + batch.request_counts.failed


def _total(batch: Batch) -> int:
    return batch.request_counts.total


def _show(display: ProgressDisplay, batch: Batch, eta_s: float | None) -> None:
    status = batch.status.replace("_", " ")
    display.show(status, batch.request_counts, batch.usage, eta_s, final=batch.final)


class _Front(TextProcess):
    """The runner of batches in the place of a server."""

    def __init__(self, assignment: Assignment, lifeline: Lifeline, job: OfflineJob) -> None:
        super().__init__(assignment, lifeline)
        self._job = job
        self._ready = asyncio.Event()
        self._stopped = asyncio.Event()
        self._runner = BatchRunner(
            job.store,
            Executor(self.state, OPERATIONS).answer,
            urls=list(OPERATIONS),
            model=self.config.model_name,
            max_samples=SAMPLES_AHEAD * self.config.max_seqs_per_forward,
            max_lines=sys.maxsize,
            joins_errors=True,
        )

    async def run(self) -> Batch:
        """Returns when the batch is finished, or cannot continue."""
        self.watch()
        turning = asyncio.create_task(self.run_ring())
        working = asyncio.create_task(self._work())
        stopped = asyncio.create_task(self._stopped.wait())
        tasks = {turning, working, stopped}
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        await self._runner.stop()
        batch = await self._runner.on_disk(self._runner.store.batch, self._job.batch_id)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for task in ended - {stopped}:
            task.result()  # raises what ended it
        await close_tracing(self.state.tracing)
        self.unwatch()
        self.lifeline.send(Done())
        return batch

    async def on_ready(self, preparer: Preparer, generations: Generations) -> None:
        await self._runner.start()
        self._ready.set()

    def on_dead(self, reason: str) -> None:
        self._stopped.set()

    def on_stop(self) -> None:
        self._stopped.set()

    async def _work(self) -> None:
        with ProgressDisplay() as display:
            await self._ready.wait()
            work = asyncio.create_task(self._runner.wait(self._job.batch_id))
            try:
                while not work.done():
                    batch = await self._batch()
                    _show(display, batch, self._eta_s(batch))
                    await asyncio.wait({work}, timeout=_REFRESH_S)
                _show(display, await self._batch(), None)
            finally:
                work.cancel()

    async def _batch(self) -> Batch:
        return await self._runner.on_disk(self._runner.store.batch, self._job.batch_id)

    def _eta_s(self, batch: Batch) -> float | None:
        """The manager's prediction for the lines that it has, and the same pace for the others."""
        backlog_s, num_here = self.state.etas().backlog_s, self._runner.num_lines_in_flight
        if backlog_s is None or num_here == 0:
            return None
        return backlog_s * max(1.0, (batch.request_counts.total - _answered(batch)) / num_here)


if __name__ == "__main__":
    sys.exit(main())
