"""FlashInfer's own planner in C++, compiled for the host: what room it takes, and what it plans."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
from pathlib import Path

import numpy as np

__all__ = ["NoRoom", "Planner"]

_SOURCE = Path(__file__).with_suffix(".cpp")
_MOST_VALUES = 64
_ALIGNMENT = 16


def _directories(package: str) -> list[Path]:
    """Those of a package, which is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"there is no {package}: run `make test-cuda`"
    return [Path(each) for each in spec.submodule_search_locations or ()]


class NoRoom(Exception):
    """The planner says that a workspace is too small."""


class Planner:
    """Plans calls.

    Args:
        directory: for the library.
        num_processors: multiprocessors of the device.
    """

    def __init__(self, directory: Path, num_processors: int) -> None:
        self._num_processors = num_processors
        library = directory / "planner.so"
        data = _directories("flashinfer")[0] / "data"
        headers = [data / "include", data / "cccl" / "libcudacxx" / "include"]
        headers += [each / "cu13" / "include" for each in _directories("nvidia")]
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w"]
        command += [f"-I{path}" for path in headers]
        subprocess.run([*command, str(_SOURCE), "-o", str(library)], check=True)
        self._plan = ctypes.CDLL(str(library)).plan_prefill
        self._plan.restype = ctypes.c_longlong

    def plan(
        self,
        query_starts: np.ndarray,
        page_starts: np.ndarray,
        heads: tuple[int, int, int],
        page_size: int,
        *,
        is_graph: bool,
        num_bytes: int,
        num_plan_bytes: int,
    ) -> tuple[int, tuple[int, ...]]:
        """Plans a call.

        Args:
            query_starts: [requests + 1].
            page_starts: [requests + 1].
            heads: query heads, key heads, and numbers of a head.
            page_size: in tokens.
            is_graph: it runs in a graph.
            num_bytes: of the workspace for partial results.
            num_plan_bytes: of that for the plan.

        Returns:
            The bytes of the plan, and what the kernels are launched with.

        Raises:
            NoRoom: a workspace is too small.
        """
        queries, pages = (
            np.ascontiguousarray(each, np.int32) for each in (query_starts, page_starts)
        )
        room = np.zeros(num_plan_bytes + _ALIGNMENT, np.uint8)
        address = -(-room.ctypes.data // _ALIGNMENT) * _ALIGNMENT
        values, error = np.zeros(_MOST_VALUES, np.int64), ctypes.create_string_buffer(256)
        copied = self._plan(
            queries.ctypes.data_as(ctypes.c_void_p),
            pages.ctypes.data_as(ctypes.c_void_p),
            *map(ctypes.c_uint, (len(queries) - 1, *heads, page_size)),
            *map(ctypes.c_int, (is_graph, self._num_processors)),
            # Nothing is written there on the host.
            ctypes.c_void_p(1 << 28),
            ctypes.c_size_t(num_bytes),
            ctypes.c_void_p(address),
            ctypes.c_size_t(num_plan_bytes),
            values.ctypes.data_as(ctypes.c_void_p),
            error,
        )
        if copied < 0:
            raise NoRoom(error.value.decode())
        return copied, tuple(values[1 : 1 + values[0]].tolist())
