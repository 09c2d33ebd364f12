"""Processes that each are a rank, and run functions of tests together.

They are forked by a server that has loaded torch and transformers once, and serve many tests.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tokasaurus.model.parallel.collectives import GroupRank, open_tensor_parallel
from tokasaurus.model.parallel.ranks import Ranks
from tokasaurus.model.parallel.tensor_parallel import TensorParallel

_TIMEOUT_S = 60


@dataclass(frozen=True)
class Meeting:
    """What a rank knows when a function begins.

    Attributes:
        rank: from 0.
        size: number of ranks.
        rendezvous: where they meet.
    """

    rank: int
    size: int
    rendezvous: str

    def tensor_parallel(self, *, shared: bool = True) -> TensorParallel:
        """All ranks share each layer, through shared memory or through gloo."""
        group = Ranks(self.rank, self.size, 1, self.rendezvous).tp_group
        if not shared:
            return GroupRank(group)
        parallel = open_tensor_parallel(group, torch.device("cpu"), "auto")
        assert type(parallel) is not GroupRank
        return parallel


class RankProcesses:
    """Processes that wait for functions.

    Args:
        size: how many.
        directory: for the files that they meet at.
    """

    def __init__(self, size: int, directory: Path) -> None:
        self._directory, self._num_runs = directory, 0
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["worker_script", "torch.distributed"])
        self._connections: list[Connection] = []
        self._processes = []
        with pytest.MonkeyPatch.context() as patch:
            # Where the server finds the modules of tests.
            patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
            for _ in range(size):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, sys.path), daemon=True)
                process.start()
                self._connections.append(ours)
                self._processes.append(process)

    def run(self, size: int, function: Callable[..., Any], *arguments: Any, **named: Any) -> list:
        """Calls ``function(meeting, *arguments)`` at this number of ranks.

        Args:
            size: ranks, no more than processes.
            function: of a module.
            arguments: the same for all ranks.

        Returns:
            What each rank returned.
        """
        self._num_runs += 1
        rendezvous = f"file://{self._directory}/{self._num_runs}"
        chosen = self._connections[:size]
        for rank, connection in enumerate(chosen):
            meeting = Meeting(rank, size, rendezvous)
            connection.send_bytes(pickle.dumps((function, meeting, arguments, named)))
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


def _serve(connection: Connection, path: list[str]) -> None:
    sys.path[:] = path
    torch.set_num_threads(1)
    while True:
        function, meeting, arguments, named = pickle.loads(connection.recv_bytes())
        try:
            connection.send((True, function(meeting, *arguments, **named)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
        if dist.is_initialized():
            dist.destroy_process_group()
