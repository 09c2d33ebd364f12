"""Collectives of the ranks of a stage, which share each layer, and the choice between two ways.

Ranks of one machine without GPUs share memory (``backend/cpu/shared_memory.py``). All others go
through torch.distributed: NCCL between GPUs, gloo between processors.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tokasaurus.model.backend.cpu.shared_memory import SharedMemory, SharedMemoryRank, why_not
from tokasaurus.model.parallel.ranks import naming_loss
from tokasaurus.model.parallel.tensor_parallel import ALONE, TensorParallel

__all__ = ["GroupRank", "open_tensor_parallel"]

log = logging.getLogger(__name__)

# Of a machine, until it is started again.
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class GroupRank:
    """Implements ``TensorParallel`` by torch.distributed.

    Args:
        group: of all ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank, self.size = group.rank(), group.size()

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        if x.device.type != "cpu":
            dist.all_reduce(x, group=self._group)
            return x
        # In gloo's own sums the order depends on the place of a number in the message.
        every = [torch.empty_like(x) for _ in range(self.size)]
        with naming_loss():
            dist.all_gather(every, x, self._group)
        total = every[0].to(torch.float32)
        for each in every[1:]:
            total += each
        return total.to(x.dtype)

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        padded = F.pad(x, (0, max(sizes) - x.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes] if self.rank == 0 else None
        with naming_loss():
            dist.gather(padded, parts, group=self._group, group_dst=0)
        if parts is None:
            return x.new_empty(0, sum(sizes))
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], 1)


def open_tensor_parallel(
    group: dist.ProcessGroup | None, device: torch.device, instruction_set: str
) -> TensorParallel:
    """Opens the fastest way that all ranks have. They call it together.

    Args:
        group: the ranks that share each layer; over gloo for tensors of the host. None if this one
            is alone.
        device: of the tensors.
        instruction_set: of kernels on a CPU.

    Raises:
        ConfigError: the processor does not run this instruction set.
    """
    if group is None:
        return ALONE
    if device.type != "cpu":
        return GroupRank(group)
    memory, reason = None, _first(group, why_not(instruction_set))
    if reason is None:
        memory, reason = _shared_memory(group, instruction_set)
    if memory is None:
        log.warning("ranks talk through gloo, which is slower than shared memory: %s", reason)
        return GroupRank(group)
    num_threads = torch.get_num_threads()
    return SharedMemoryRank(memory, group.rank(), group.size(), num_threads, instruction_set)


def _shared_memory(
    group: dist.ProcessGroup, instruction_set: str
) -> tuple[SharedMemory | None, str | None]:
    """Memory that all ranks have opened; or None, and why one of them cannot."""
    memory, reason, place = None, None, None
    try:
        if group.rank() == 0:
            memory = SharedMemory.make(group.size(), instruction_set)
            place = _place(memory.path)
    except OSError as error:
        reason = str(error)
    place = _first(group, place)
    try:
        if memory is None and place is not None:
            path = place.split()[-1]
            # On another machine, or in another container, the path is that of another file.
            if _place(path) == place:
                memory = SharedMemory.open(path)
            else:
                reason = "they run on different machines"
    except OSError as error:
        reason = str(error)
    reason = _first(group, reason)
    return (memory, None) if reason is None else (None, reason)


def _place(path: str) -> str:
    """What tells a file from those of all machines; its path comes last."""
    status = os.stat(path)
    return f"{_BOOT_ID.read_text().strip()} {status.st_dev} {status.st_ino} {path}"


def _first(group: dist.ProcessGroup, text: str | None) -> str | None:
    """The text of the first rank that has one, which all get; None if none has."""
    message = b"" if text is None else text.encode()
    lengths = [torch.empty(1, dtype=torch.int64) for _ in range(group.size())]
    with naming_loss():
        dist.all_gather(lengths, torch.tensor([len(message)]), group)
        for rank, length in enumerate(int(each) for each in lengths):
            if length:
                data = torch.zeros(length, dtype=torch.uint8)
                if rank == group.rank():
                    data = torch.tensor(list(message), dtype=torch.uint8)
                dist.broadcast(data, group=group, group_src=rank)
                return bytes(data.tolist()).decode()
    return None
