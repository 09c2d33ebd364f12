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
from typing import TypeAlias

from tokasaurus.batch.offline import JobProgress, OfflineJob
from tokasaurus.batch.prices import Prices
from tokasaurus.batch.runner import BatchRunner
from tokasaurus.batch.sharded import ShardedJob
from tokasaurus.batch.shards import names_several, read_part
from tokasaurus.config.engine import ENGINE
from tokasaurus.config.parser import answer_question, parse, print_help
from tokasaurus.config.pipes import ends_with_its_reader
from tokasaurus.config.schema import Schema
from tokasaurus.errors import ConfigError, LaunchError, ModelError
from tokasaurus.launch.batch_config import BatchRunConfig
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

_Job: TypeAlias = OfflineJob | ShardedJob

_SCHEMA = Schema(
    target=BatchRunConfig,
    shortcuts=ENGINE.shortcuts,
    retired=ENGINE.retired,
    foreign=ENGINE.foreign,
    reads_files=ENGINE.reads_files,
    program="toka-batch run INPUT OUTPUT",
    summary="Answer a file of requests without a server.\n\n"
    "If the command is stopped, run it again: it continues where it stopped.\n\n"
    "INPUT has one request per line (JSONL) or row (if its name ends with .parquet): a line of an\n"
    "OpenAI batch, or only its body, with a prompt or messages. OUTPUT, JSONL or Parquet, appears\n"
    "once all requests are answered, in the same order. The flags are those of the engine.\n\n"
    "INPUT may also be a directory or a pattern in quotes ('in/*.jsonl'). Then OUTPUT is a\n"
    "directory, in which each file of INPUT has an output of its own.\n\n"
    "With launcher=ray, INPUT and OUTPUT may be directories or URLs (s3://BUCKET/PATH): dp_size\n"
    "engines on a Ray cluster answer all files of INPUT.",
    examples=(
        "toka-batch run prompts.jsonl answers.jsonl",
        "toka-batch run in.parquet out.jsonl model=meta-llama/Llama-3.2-1B-Instruct",
        "toka-batch run in_dir out_dir part=3/16 price_per_million=0.6",
        "toka-batch run in_dir out_dir launcher=ray dp_size=16",
    ),
)
_QUIET = "log_level=WARNING"  # unless the command line sets it
_REFRESH_S = 0.5


@ends_with_its_reader
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
    source, target = names
    part = None if config.part is None else read_part(config.part)
    urls = [name for name in names if "://" in name]
    if urls and config.launcher != "ray":
        raise ConfigError(f"{urls[0]} is a URL; set launcher=ray, which reads and writes those")
    if part is not None and (config.launcher == "ray" or not names_several(source)):
        raise ConfigError(
            f"part={config.part} is for a directory or a pattern of files, without launcher=ray"
        )
    if source in urls or (config.launcher == "ray" and Path(source).is_dir()):
        from tokasaurus.integrations.ray.batches import run_directory

        return run_directory(config.engine, source, target, config.prices)
    if urls:
        raise ConfigError(
            f"{target} is a URL, where only the answers to a directory can go; put {source} into a"
            " directory, or name a local file for the answers"
        )
    # Its lines compete with one another only.
    slices, launcher = placed(dataclasses.replace(config, max_request_priority=MAX_PRIORITY))
    model = slices.server.model_name
    job: _Job
    if names_several(source):
        job = ShardedJob(source, Path(target), model, part)
    else:
        job = OfflineJob(Path(source), Path(target), model)
    run = _BatchRun(job, config.prices)
    if run.is_done:
        return run.conclude(0)
    status = Supervisor(slices, None, run.front, launcher).run()
    return run.conclude(status)


class _BatchRun:
    """One run of the command, seen from outside the engine."""

    def __init__(self, job: _Job, prices: Prices | None) -> None:
        self._job = job
        self._prices = prices
        self._last = job.progress()

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to be answered: an earlier run has done that."""
        return self._last.is_final

    def front(self, assignment: Assignment, lifeline: Lifeline) -> None:
        """Runs the text core's process."""
        front = _Front(assignment, lifeline, self._job, self._prices)
        self._last = asyncio.run(front.run())

    def conclude(self, status: int) -> int:
        """Publishes the output, or says how to continue; returns the exit status."""
        last, job = self._last, self._job
        if not last.is_final:
            job.store.close()
            has_begun = last.counts.total > 0
            done = f" after {last.num_answered} of {_total(last)} lines" if has_begun else ""
            print(
                f"toka-batch: stopped{done}; run the same command again to continue",
                file=sys.stderr,
            )
            return status or 130
        errors = job.conclude()
        for error in errors:
            print(f"toka-batch: error: {error}", file=sys.stderr)
        if last.num_answered or not errors:
            print(f"{job.target}: {_summary(last, self._prices)}", file=sys.stderr)
        return 2 if errors else 0


def _summary(progress: JobProgress, prices: Prices | None) -> str:
    """What was done, in a line."""
    counts, usage = progress.counts, progress.usage
    files = "" if progress.files is None else f"{_counted(progress.files[1], 'file')}, "
    failed = f", {counts.failed} with an error" if counts.failed else ""
    cost = "" if prices is None else f"; cost {prices.shown(usage)}"
    return (
        f"{files}{_counted(progress.num_answered, 'line')}{failed}; {usage.input_tokens} prompt"
        f" tokens, {usage.output_tokens} generated{cost}"
    )


def _counted(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number} {noun}s"


def _total(progress: JobProgress) -> str:
    return f"{'about ' if progress.is_estimate else ''}{progress.counts.total}"


class _Front(TextProcess):
    """The runner of batches in the place of a server."""

    def __init__(
        self, assignment: Assignment, lifeline: Lifeline, job: _Job, prices: Prices | None
    ) -> None:
        super().__init__(assignment, lifeline)
        self._job = job
        self._prices = prices
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

    async def run(self) -> JobProgress:
        """Returns when the job is finished, or cannot continue."""
        self.watch()
        turning = asyncio.create_task(self.run_ring())
        working = asyncio.create_task(self._work())
        stopped = asyncio.create_task(self._stopped.wait())
        tasks = {turning, working, stopped}
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await self._runner.stop()
        last = await self._runner.on_disk(self._job.progress)
        for task in ended - {stopped}:
            task.result()  # raises what ended it
        await close_tracing(self.state.tracing)
        self.unwatch()
        self.lifeline.send(Done())
        return last

    async def on_ready(self, preparer: Preparer, generations: Generations) -> None:
        await self._runner.start()
        self._ready.set()

    def on_dead(self, reason: str) -> None:
        self._stopped.set()

    def on_stop(self) -> None:
        self._stopped.set()

    async def _work(self) -> None:
        with ProgressDisplay(self._prices) as display:
            display.begin()
            await self._ready.wait()
            work = asyncio.create_task(self._job.run(self._runner))
            try:
                while not work.done():
                    await self._show(display, await self._progress())
                    await asyncio.wait({work}, timeout=_REFRESH_S)
                work.result()
                await self._show(display, await self._progress())
            finally:
                work.cancel()

    async def _progress(self) -> JobProgress:
        return await self._runner.on_disk(self._job.progress)

    async def _show(self, display: ProgressDisplay, progress: JobProgress) -> None:
        # The manager's prediction for the lines that it has, and the same pace for the others.
        backlog_s, num_here = self.state.etas().backlog_s, self._runner.num_lines_in_flight
        num_left = progress.counts.total - progress.num_answered
        forecast_s = None
        if backlog_s is not None and num_here:
            forecast_s = backlog_s * max(1.0, num_left / num_here)
        display.show(progress, forecast_s, is_whole=num_left <= num_here)


if __name__ == "__main__":
    sys.exit(main())
