"""Sums and gathers of ranks on one machine, through memory that they share.

``shared_memory.cpp`` through ctypes.

Their calls can be recorded with those of a pass's other kernels (``calls.py``).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from torch import Tensor

from tokasaurus.model.backend.cpu.build import BuildError
from tokasaurus.model.backend.cpu.calls import Kernel, call, load_kernels, result
from tokasaurus.model.backend.cpu.operators import ELEMENTS

__all__ = ["SharedMemory", "SharedMemoryRank", "why_not"]

_SOURCE = Path(__file__).with_name("shared_memory.cpp")

# Of a piece of a message. It stays in the caches on its way from one rank to another.
_ROOM_SIZE = 1 << 18

# Rounds of waiting before a rank sleeps: some ten microseconds, about as long as it takes to sleep
# and to be woken. Ranks that share cores sleep at once, so that the one they wait for can run.
_SPINS = 1000

_int, _long, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


# These mirror the structures of the C++ file.
class _Ranks(ctypes.Structure):
    _fields_ = (
        *(("memory", _pointer), ("room_size", _long), ("rank", _int), ("size", _int)),
        *(("num_spins", _int), ("piece", ctypes.c_uint32)),
    )


class _Sum(ctypes.Structure):
    _fields_ = (("ranks", _pointer), ("x", _pointer), ("size", _long), ("element", _int))


class _Gather(ctypes.Structure):
    _fields_ = (("ranks", _pointer), ("x", _pointer), ("y", _pointer), ("row_bytes", _pointer))


@cache
def _library(instruction_set: str) -> tuple[ctypes.CDLL, tuple[Kernel, ...]]:
    structures: dict[str, type[ctypes.Structure]] = {
        "tokasaurus_sum": _Sum,
        "tokasaurus_gather": _Gather,
    }
    library, kernels = load_kernels(_SOURCE, instruction_set, structures)
    library.tokasaurus_shared_size.argtypes = (_int, _long)
    library.tokasaurus_shared_size.restype = _long
    return library, kernels


def why_not(instruction_set: str) -> str | None:
    """Why ranks of this machine cannot share memory, and the remedy; None if they can.

    Raises:
        ConfigError: the processor does not run this instruction set.
    """
    if sys.platform != "linux":
        return "ranks share memory on Linux only"
    try:
        _library(instruction_set)
    except BuildError as error:
        return f"no kernel can be built: {error}; install g++"
    return None


class SharedMemory:
    """Memory that the ranks of one machine share. It has no name, and goes with the last of them.

    One rank makes it, and the others open it.

    Args:
        file: of the memory, which this object closes.
    """

    def __init__(self, file: int) -> None:
        self._file = os.fdopen(file, "r+b")
        self.block = mmap.mmap(file, os.fstat(file).st_size)

    @classmethod
    def make(cls, size: int, instruction_set: str) -> SharedMemory:
        """Memory for this number of ranks.

        Raises:
            OSError: the system gives none.
        """
        num_bytes = _library(instruction_set)[0].tokasaurus_shared_size(size, _ROOM_SIZE)
        file = os.memfd_create("tokasaurus-ranks")
        os.ftruncate(file, num_bytes)
        return cls(file)

    @classmethod
    def open(cls, path: str) -> SharedMemory:
        """The memory of another process.

        Args:
            path: as the other process says.

        Raises:
            OSError: the system does not allow it.
        """
        return cls(os.open(path, os.O_RDWR))

    @property
    def path(self) -> str:
        """For other processes of this user."""
        return f"/proc/{os.getpid()}/fd/{self._file.fileno()}"


class SharedMemoryRank:
    """One of several ranks that share memory. All of them make the same calls, in the same order.

    A call waits for the other ranks, for ever if one of them has ended: the process can be killed.

    Args:
        memory: of all ranks.
        rank: of this process.
        size: ranks.
        num_threads: of each rank.
        instruction_set: the name of one, or "auto".
    """

    def __init__(
        self,
        memory: SharedMemory,
        rank: int,
        size: int,
        num_threads: int,
        instruction_set: str,
    ) -> None:
        self.rank, self.size = rank, size
        _, (self._sum, self._gather) = _library(instruction_set)
        self._memory = memory  # keeps the address
        fits = size * num_threads <= _num_cores()
        self._ranks = _Ranks(
            memory=ctypes.addressof(ctypes.c_char.from_buffer(memory.block)),
            room_size=_ROOM_SIZE,
            rank=rank,
            size=size,
            num_spins=_SPINS if fits else 0,
        )

    def all_reduce(self, x: Tensor) -> Tensor:
        """Replaces x, [rows, size] in fp32, bf16 or fp16, by the sum of all ranks' x."""
        x = x.contiguous()
        arguments = _Sum(
            ranks=ctypes.addressof(self._ranks),
            x=x.data_ptr(),
            size=x.shape[1],
            element=ELEMENTS[x.dtype],
        )
        call(self._sum, arguments, len(x))
        return x

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Puts the columns of all ranks side by side, at rank 0.

        Args:
            x: [rows, this rank's number of columns].
            sizes: [ranks], the number of columns of each.

        Returns:
            At rank 0 [rows, all columns], elsewhere [0, all columns].
        """
        x = x.contiguous()
        y = result(0 if self.rank else len(x), sum(sizes), x.dtype)
        row_bytes = np.array(sizes, np.int64) * x.itemsize
        arguments = _Gather(
            ranks=ctypes.addressof(self._ranks),
            x=x.data_ptr(),
            y=y.data_ptr(),
            row_bytes=row_bytes.ctypes.data,
        )
        arguments.kept = row_bytes
        call(self._gather, arguments, len(x))
        return y


def _num_cores() -> int:
    """That this process may use."""
    with contextlib.suppress(AttributeError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
