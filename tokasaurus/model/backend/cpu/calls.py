"""How Python calls the CPU's kernels: at once, or from a recording.

Each kernel is a C function of (arguments, number of rows, number of threads), where arguments point
to a structure. Between two matrix products, which stream megabytes of weights through the caches,
some lines of Python take 20 to 30 microseconds. A pass has hundreds of kernels, so their calls are
recorded once, and then carried out by a loop in C for each batch::

    recorded     norm(x -> a)   multiply(a -> b)   attend(b -> a)   multiply(a -> c)  ...
    a batch      rows = 7:  norm, multiply, attend, multiply ...

The results of kernels lie in buffers for the largest batch. A smaller one uses the first rows.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tokasaurus.model.backend.cpu.build import BuildError, load_library
from tokasaurus.model.storage import Region
from tokasaurus.rounding import round_up

__all__ = ["Kernel", "NotRecordable", "Recording", "call", "load_kernels", "load_replay", "result"]

Kernel = Any
"""A function of a library, as ``load_kernels`` returns it."""

_SOURCE = Path(__file__).with_name("replay.cpp")

# Of a buffer's size, so that tensors of similar sizes use the same buffers.
_BUFFER_STEP = 1 << 16

_recording: ContextVar[Recording | None] = ContextVar("_recording", default=None)


class NotRecordable(Exception):
    """The layers do more than call kernels. The message names what."""


def result(num_rows: int, size: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor for what a kernel returns, [rows, size]."""
    recording = _recording.get()
    if recording is not None:
        return recording.buffer(num_rows, size, dtype)
    return torch.empty((num_rows, size), dtype=dtype)


def call(kernel: Kernel, arguments: ctypes.Structure, num_rows: int) -> Any:
    """Calls a kernel, or records the call.

    Args:
        kernel: the function.
        arguments: a structure of its own for each call.
        num_rows: of the batch.

    Returns:
        The arguments of this kernel's last call before, if both are recorded; else None.
    """
    recording = _recording.get()
    if recording is not None:
        return recording.add(kernel, arguments, num_rows)
    kernel(ctypes.byref(arguments), num_rows, torch.get_num_threads())
    return None


def load_kernels(
    source: Path, instruction_set: str, structures: dict[str, type[ctypes.Structure]]
) -> tuple[ctypes.CDLL, tuple[Kernel, ...]]:
    """Loads a library and its kernels.

    Args:
        source: its C++ file.
        instruction_set: the name of one, or "auto".
        structures: the arguments of each kernel by the name of its function. The library has their
            sizes in ``tokasaurus_sizes``, in this order.

    Raises:
        BuildError: it cannot be built on this machine.
        ConfigError: the processor does not run this instruction set.
    """
    library = load_library(source, instruction_set)
    sizes = (ctypes.c_int64 * len(structures)).in_dll(library, "tokasaurus_sizes")
    if list(sizes) != [ctypes.sizeof(structure) for structure in structures.values()]:
        raise BuildError("the compiler lays out the kernels' arguments in an unexpected way")
    kernels = []
    for name in structures:
        kernel = getattr(library, name)
        kernel.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32)
        kernel.restype = None
        kernels.append(kernel)
    return library, tuple(kernels)


class _Call(ctypes.Structure):
    """Mirrors ``Call`` of ``replay.cpp``."""

    _fields_ = (("kernel", ctypes.c_void_p), ("arguments", ctypes.c_void_p))


@cache
def load_replay() -> Callable[[Any, int, int, int], None]:
    """The loop that runs a recording: (table of calls, calls, rows, threads).

    Raises:
        BuildError: it cannot be built on this machine.
    """
    function = load_library(_SOURCE).tokasaurus_replay
    function.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32)
    function.restype = None
    return function


class Recording:
    """Kernels to call for each batch, one after the other.

    Use it as a context: kernels that are called within are recorded and do not run. What torch does
    within would not be repeated, so it raises NotRecordable, but for views.

    Args:
        max_rows: of a batch.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self._memory = Region()
        self._free: list[Tensor] = []
        self._calls: list[_Call] = []
        self._arguments: list[ctypes.Structure] = []
        self._latest: dict[int | None, ctypes.Structure] = {}
        self._guard = _ViewsOnly()  # type: ignore[no-untyped-call]
        self._table: ctypes.Array[_Call] | None = None

    def __enter__(self) -> Recording:
        self._token = _recording.set(self)
        self._guard.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        self._guard.__exit__(*error)  # type: ignore[no-untyped-call]
        _recording.reset(self._token)
        self._table = (_Call * len(self._calls))(*self._calls)

    def add(
        self, kernel: Kernel, arguments: ctypes.Structure, num_rows: int
    ) -> ctypes.Structure | None:
        """Records a call; see ``call``. Its arguments are kept."""
        if num_rows != self.max_rows:
            raise NotRecordable(f"a kernel has {num_rows} rows, and the batch {self.max_rows}")
        address = ctypes.cast(kernel, ctypes.c_void_p).value
        former = self._latest.get(address)
        self._latest[address] = arguments
        self._arguments.append(arguments)
        self._calls.append(_Call(address, ctypes.addressof(arguments)))
        return former

    def buffer(self, num_rows: int, size: int, dtype: torch.dtype) -> Tensor:
        """A tensor, [rows, size]. Its memory gets another use once no tensor points to it."""
        self._guard.is_active = False
        num_bytes = num_rows * size * dtype.itemsize
        block = self._take(round_up(num_bytes, _BUFFER_STEP))
        room = _room_type(num_bytes).from_address(block.data_ptr())
        weakref.finalize(room, self._free.append, block)
        tensor = torch.frombuffer(room, dtype=dtype).view(num_rows, size)
        self._guard.is_active = True
        return tensor

    def _take(self, num_bytes: int) -> Tensor:
        """The smallest free block that is large enough, or a new one."""
        fitting = [number for number, block in enumerate(self._free) if len(block) >= num_bytes]
        if not fitting:
            return self._memory.empty((num_bytes,), torch.uint8, torch.device("cpu"))
        return self._free.pop(min(fitting, key=lambda number: len(self._free[number])))

    def run(self, num_rows: int) -> None:
        """Calls the kernels for the first rows of the buffers."""
        assert self._table is not None
        load_replay()(self._table, len(self._table), num_rows, torch.get_num_threads())


class _ViewsOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses operators of torch that compute."""

    is_active = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keeps torch from loading its compiler at the first operator: 1.4 s of every start."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if self.is_active and not func.is_view:
            raise NotRecordable(f"the layers call {func}")
        returned = func(*args, **(kwargs or {}))
        # In inference mode reshape, to and contiguous come here whole. They may copy.
        if self.is_active and not _are_views(returned, args[0]):
            raise NotRecordable(f"the layers copy by {func}")
        return returned


def _are_views(returned: Any, tensor: Tensor) -> bool:
    """Whether what an operator returned, one tensor or several, lies in the memory of another."""
    tensors = returned if isinstance(returned, list | tuple) else [returned]
    address = tensor.untyped_storage().data_ptr()
    return all(each.untyped_storage().data_ptr() == address for each in tensors)


@cache
def _room_type(num_bytes: int) -> Any:
    """Memory that can have a finalizer, which a plain array cannot."""
    return type("_Room", (ctypes.c_char * num_bytes,), {})
