"""Memory that a running engine has planned with and not taken yet.

A system promises memory before it has it: pages of the KV cache are taken when they are first
written. So what it calls available while an engine runs is partly that engine's.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokasaurus.config.memory import amount
from tokasaurus.config.slices import EngineSlices

__all__ = ["untaken_memory"]


def untaken_memory(slices: EngineSlices, process_ids: Iterable[int]) -> tuple[int, str]:
    """Bytes of the host's memory that an engine may still take, and how that was computed.

    On CUDA devices everything is taken at the start.

    Args:
        slices: its configuration.
        process_ids: of its workers.
    """
    workers = [worker for replica in slices.replicas for worker in replica.workers]
    if any(worker.device != "cpu" for worker in workers):
        return 0, ""
    planned = len(workers) * sum(item.num_bytes for item in slices.memory_plan.items)
    taken = sum(map(_resident_bytes, process_ids))
    untaken = max(0, planned - taken)
    return untaken, (
        f"the running engine has planned with {amount(planned)}, of which it has taken"
        f" {amount(taken)} so far"
    )


def _resident_bytes(process_id: int) -> int:
    """What a process holds for itself; 0 if the system does not say."""
    try:
        lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    except OSError:
        return 0
    kinds = ("RssAnon:", "RssShmem:")
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(kinds))
