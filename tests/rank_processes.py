"""Processes that each are a rank, and run functions of tests together.

They are forked by a server that has loaded torch once, and serve many tests.
"""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tokasaurus.model.parallel.tensor_parallel import TensorParallel

_SIZES = (2, 4)
_TIMEOUT_S = 60


class RankProcesses:
    """Four processes. A function runs in the first two of them, or in all.

    Args:
        directory: for the file that they meet at.
    """

    def __init__(self, directory: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tokasaurus.model.worker.worker", "torch.distributed"])
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(max(_SIZES)):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, directory, theirs, sys.path), daemon=True
            )
            process.start()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, size: int, function: Callable[..., Any], *arguments: Any, shared=True) -> list:
        """Calls ``function(parallel, *arguments)`` at this number of ranks, 2 or 4.

        Args:
            size: ranks.
            function: of a module; gets the rank's ``TensorParallel``.
            arguments: the same for all ranks.
            shared: the ranks share memory; otherwise they talk through gloo.

        Returns:
            What each rank returned.
        """
        chosen = self._connections[:size]
        for connection in chosen:
            connection.send_bytes(pickle.dumps((size, shared, function, arguments)))
        results = []
        for rank, connection in enumerate(chosen):
            assert connection.poll(_TIMEOUT_S), f"rank {rank} of {size} does not answer"
            ok, value = connection.recv()
            assert ok, f"rank {rank} of {size}:\n{value}"
            results.append(value)
        return results

    def end(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def _serve(rank: int, directory: Path, connection: Connection, path: list[str]) -> None:
    sys.path[:] = path
    import torch
    import torch.distributed as dist

    from tokasaurus.model.parallel.collectives import GroupRank, open_tensor_parallel

    torch.set_num_threads(1)
    store = dist.FileStore(str(directory / "ranks"), max(_SIZES))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=max(_SIZES))
    ways: dict[tuple[int, bool], TensorParallel] = {}
    for size in _SIZES:
        group = dist.new_group(list(range(size)))
        if rank < size:
            ways[size, False] = GroupRank(group)
            ways[size, True] = open_tensor_parallel(group, torch.device("cpu"), "auto")
            assert type(ways[size, True]) is not GroupRank
    while True:
        size, shared, function, arguments = pickle.loads(connection.recv_bytes())
        try:
            connection.send((True, function(ways[size, shared], *arguments)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
