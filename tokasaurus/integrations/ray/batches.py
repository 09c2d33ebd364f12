"""``toka-batch run IN_DIR OUT_DIR launcher=ray``: a directory of requests on a Ray cluster.

::

    names of files ─▶ readers ─▶ blocks ─▶ actors, each an engine ─▶ counts ─▶ this program
                                             └─▶ result files

Ray Data moves the blocks, a few ahead of the engines, and gives those of a lost node to others. The
result files say which blocks are done, so a run that was killed continues where it ended.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from tokasaurus.batch.offline import JobProgress
from tokasaurus.batch.prices import Prices
from tokasaurus.batch.records import RequestCounts, Usage
from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.resolve import BUNDLED_MODEL_NAME
from tokasaurus.errors import ConfigError, EngineError, TokasaurusError
from tokasaurus.integrations.ray.answerer import (
    Answerer,
    blocks_ahead,
    engine_of_an_actor,
)
from tokasaurus.integrations.ray.batch_files import Directory, blocks_of, claim, input_files
from tokasaurus.integrations.ray.bundles import Bundles, plan_bundles
from tokasaurus.integrations.ray.launcher import connect, reserve
from tokasaurus.integrations.ray.rows import BlockDone, Row, decode_row, encode_row
from tokasaurus.launch.batch_progress import ProgressDisplay
from tokasaurus.server.protocols.table import OPERATIONS

__all__ = ["run_directory"]

_NUM_READERS = 4  # files that are read at once
_FORMER_RUN_S = 30.0  # within which the cluster has noticed that a run was killed


def run_directory(
    config: EngineConfig, source: str, target: str, prices: Prices | None = None
) -> int:
    """Answers all files of a directory.

    Args:
        config: ``dp_size`` is the number of engines.
        source, target: directories, as paths or URLs, that every node of the cluster reaches.
        prices: of tokens; None if no cost is to be shown.

    Returns:
        The exit status: 0 if every line has an answer or an error of its own, 1 if an engine ended,
        130 after Ctrl-C.

    Raises:
        ConfigError: Ray is not installed, or a directory or a file is wrong.
        LaunchError: there is no cluster, or no room in it in time.
        ModelError: the model cannot be found or served.
    """
    deadline = time.monotonic() + config.launch_timeout_s
    ray = connect(config)
    try:
        requests, results = Directory.at(source), Directory.at(target)
        files = input_files(requests)
        holder = _hold(ray, target, results)  # noqa: F841  # the actor ends with its last handle
        claim(results, config.served_model_name or config.model or BUNDLED_MODEL_NAME)
        return _run(ray, config, requests, results, files, deadline, prices)
    finally:
        ray.shutdown()


class _Holder:
    """An actor whose name says that a run writes to a directory. It ends with the run."""

    def held(self) -> None:
        """Returns when the actor is there."""


def _hold(ray: Any, target: str, results: Directory) -> Any:
    """Makes the holder. Raises ConfigError if another run writes to the same directory."""
    name = f"toka-batch {results.system.type_name} {results.path}"
    deadline = time.monotonic() + _FORMER_RUN_S
    while True:
        try:
            holder = ray.remote(_Holder).options(name=name, num_cpus=0).remote()
            ray.get(holder.held.remote())
            return holder
        except ValueError:
            if time.monotonic() > deadline:
                raise ConfigError(f"{target} is in use: another run writes to it") from None
            time.sleep(0.5)


def _run(
    ray: Any,
    config: EngineConfig,
    requests: Directory,
    results: Directory,
    files: dict[str, int],
    deadline: float,
    prices: Prices | None,
) -> int:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # An actor is on one node, and so are all workers of its engine.
    together = replace(config, pp_size=1, tp_size=config.pp_size * config.tp_size)
    bundles = plan_bundles(together, nodes)
    # Ray Data takes what is free, and would wait for the rest without a word.
    ray.util.remove_placement_group(reserve(ray, bundles, deadline))
    progress = _Progress(sum(files.values()))
    try:
        with ProgressDisplay(prices) as display:
            display.begin()
            for item in _answered(config, requests, results, list(files), bundles).iter_rows():
                row = decode_row(item["row"])
                if isinstance(row, TokasaurusError):
                    raise row
                assert isinstance(row, BlockDone)  # an engine has answered each block
                progress.add(row)
                progress.show(display)
    except KeyboardInterrupt:
        return progress.stopped(130)
    except (EngineError, ray.exceptions.RayError) as error:
        print(f"toka-batch: error: {error}", file=sys.stderr)
        return progress.stopped(1)
    progress.conclude(results, prices)
    return 0


def _answered(
    config: EngineConfig,
    requests: Directory,
    results: Directory,
    files: list[str],
    bundles: Bundles,
) -> Any:
    """The data set of all blocks that are done. Iterating over it carries the work out."""
    from ray import data

    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    # Otherwise readers and engines keep what they make until there is more of it.
    context.target_max_block_size = 1
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # It warns that there are no progress bars.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    by_file = data.from_items([{"file": file} for file in files], override_num_blocks=len(files))
    blocks = by_file.map_batches(
        partial(_read, requests=requests, results=results),
        batch_size=1,
        compute=data.TaskPoolStrategy(size=min(_NUM_READERS, len(files))),
        num_cpus=0,
    )
    num_threads = bundles.amount // bundles.workers if bundles.resource == "CPU" else None
    num_ahead = blocks_ahead(config)
    return blocks.map_batches(
        Answerer,
        fn_constructor_args=(engine_of_an_actor(config, num_threads), results),
        batch_size=1,
        compute=data.ActorPoolStrategy(
            size=config.dp_size,
            max_tasks_in_flight_per_actor=num_ahead,
            max_concurrent_calls_per_actor=num_ahead,
        ),
        **{f"num_{bundles.resource.lower()}s": bundles.amount},
    )


def _read(
    batch: dict[str, Any], requests: Directory, results: Directory
) -> Iterator[dict[str, list[bytes]]]:
    """Divides files into blocks; of those that are done only the counts are passed on."""
    try:
        for name in batch["file"]:
            for block in blocks_of(requests, str(name), OPERATIONS):
                row: Row = block
                if results.exists(block.name):
                    row = BlockDone(block.name, len(block.lines), block.num_bytes)
                yield {"row": [encode_row(row)]}
    except ConfigError as error:
        yield {"row": [encode_row(error)]}


class _Progress:
    """What is known of a run. The number of its lines is not, until all files are read."""

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._done_bytes = self._new_bytes = 0.0
        self._num_done = self._num_before = self._num_failed = 0
        self._usage = Usage()
        self._names: set[str] = set()
        self._begun = time.monotonic()

    def add(self, done: BlockDone) -> None:
        """Counts a block."""
        self._names.add(done.name)
        self._num_done += done.num_lines
        self._done_bytes += done.num_bytes
        if done.num_failed is None:
            self._num_before += done.num_lines
            return
        self._new_bytes += done.num_bytes
        self._num_failed += done.num_failed
        self._usage += done.usage

    def show(self, display: ProgressDisplay) -> None:
        """Shows the counts, and an estimate of what is left."""
        left = max(0.0, self._total_bytes - self._done_bytes)
        eta_s = None
        if self._new_bytes:
            eta_s = (time.monotonic() - self._begun) * left / self._new_bytes
        share = min(1.0, self._done_bytes / max(1, self._total_bytes))
        total = round(self._num_done / share) if share else 0
        completed = self._num_done - self._num_failed
        counts = RequestCounts(total, completed, self._num_failed)
        progress = JobProgress("in progress", counts, self._usage, share == 1.0, share < 1.0)
        display.show(progress, eta_s)

    def stopped(self, status: int) -> int:
        """Says how to continue; returns the exit status."""
        done = f" after {self._num_done} lines" if self._num_done else ""
        print(f"toka-batch: stopped{done}; run the same command again to continue", file=sys.stderr)
        return status

    def conclude(self, results: Directory, prices: Prices | None) -> None:
        """Says what was done."""
        cost = "" if prices is None else f"; cost {prices.shown(self._usage)}"
        before = f", {self._num_before} of them answered before" if self._num_before else ""
        failed = f", {self._num_failed} with an error" if self._num_failed else ""
        print(
            f"{results.path}: {self._num_done} lines{before}{failed};"
            f" {self._usage.input_tokens} prompt tokens, {self._usage.output_tokens} generated"
            f"{cost}",
            file=sys.stderr,
        )
        others = sorted(
            name for name in results.files() if name not in self._names and not name.startswith("_")
        )
        if others:
            print(
                f"toka-batch: warning: {len(others)} result files, such as {others[0]}, are of rows"
                " that the input does not have any more; delete them",
                file=sys.stderr,
            )
