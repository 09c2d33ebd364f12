"""How the threads of workers share the processor with one another and with the other processes."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import replace

from tokasaurus.config.slices import EngineSlices, WorkerConfig

__all__ = ["bound_spinning", "num_cores", "with_threads"]

# How OpenMP's threads wait, in the words of the standard and of GNU's runtime.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

# Rounds of waiting before a thread sleeps: a few hundred microseconds, which is longer than the
# host needs between two kernels of a pass.
_SPINS = "10000"


def bound_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets OpenMP's threads sleep soon while they wait, unless the user chose otherwise.

    By default they spin for milliseconds after each pass, on cores that the server and the manager
    need. If they slept at once, they would have to be woken for each of a pass's hundreds of
    kernels. The runtime reads this as torch is imported, so call it before.
    """
    if not any(name in environment for name in _WAITING):
        environment["GOMP_SPINCOUNT"] = _SPINS


def with_threads(worker: WorkerConfig, slices: EngineSlices) -> WorkerConfig:
    """The worker's slice with its share of the cores, where several workers compute on them.

    A single worker keeps what the user or torch chose.
    """
    num_workers = sum(len(replica.workers) for replica in slices.replicas)
    if worker.device != "cpu" or worker.num_threads is not None or num_workers == 1:
        return worker
    return replace(worker, num_threads=max(1, num_cores() // num_workers))


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
