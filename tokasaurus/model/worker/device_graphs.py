"""Records work on a device once, and repeats its kernels without Python.

This is the only place that knows ``torch.cuda.CUDAGraph``. Tests put another recorder in its place,
which runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["CudaGraphs", "DeviceGraph", "DeviceGraphs"]


class DeviceGraph(Protocol):
    """Recorded kernels, with the addresses that they read and write."""

    def replay(self) -> None:
        """Enqueues the kernels on the current stream."""
        ...


class DeviceGraphs(Protocol):
    """Graphs that use the same memory, one after the other."""

    def record(self, work: Callable[[], Tensor]) -> tuple[DeviceGraph, Tensor]:
        """Runs the work, then records it.

        The first run builds what kernels lack, which must not happen while they are recorded.

        Args:
            work: enqueues kernels and waits for nothing. It reads tensors only that live longer
                than the graph, and the addresses of these stay.

        Returns:
            The graph, and the tensor that the work has returned, which each replay writes anew. It
            may lie where other graphs write, so it is to be read before the next replay.
        """
        ...


class CudaGraphs:
    """Implements ``DeviceGraphs``. They are freed together.

    Args:
        device: of the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = _stream_of(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Tensor]) -> tuple[DeviceGraph, Tensor]:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as that of grammars, may call the device meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                result = work()
        except Exception as error:
            # Once something cannot be recorded, to end the recording fails, too, and says less.
            if error.__context__ is None:
                raise
            raise error.__context__ from None
        return graph, result


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """The stream of all recordings. The products of each stream keep memory of their own."""
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream
