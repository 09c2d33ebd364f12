"""A CUDA device that is not there: its tensors have shapes, dtypes and a device, but no numbers.

torch's fake tensors refuse operands on different devices, and everything that needs a number from
the device. Copies that block the host are refused here, too, while they are watched. Where the host
waits all the same, the place is noted.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from tokasaurus.model import download, upload
from tokasaurus.model.download import Download
from tokasaurus.model.sampling import draws, kinds
from tokasaurus.model.worker import device_tables
from tokasaurus.model.worker import worker as worker_module

__all__ = ["DEVICE", "FakeCuda"]

DEVICE = torch.device("cuda", 0)
_CPU = torch.device("cpu")

# Of c10::DeviceType, and how many there are.
_CUDA, _META, _NUM_TYPES = 1, 14, 22


class FakeCuda:
    """Lets the engine's code run with tensors on a CUDA device.

    Args:
        monkeypatch: takes it all back.

    Attributes:
        waits: the functions of the engine in which the host has waited for the device.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waits: list[str] = []
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
        monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        # It has no memory that could be measured.
        monkeypatch.setattr(worker_module, "open_device_memory", lambda _: None)
        monkeypatch.setattr(torch, "Event", lambda *_, **__: _Event(self))
        monkeypatch.setattr(download, "_stream_of", lambda _: _Stream(self))
        monkeypatch.setattr(torch.accelerator, "current_stream", lambda _: _Stream(self))
        monkeypatch.setattr(torch.accelerator, "synchronize", lambda _: self.wait())
        monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
        monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
        monkeypatch.setattr(Download, "array", self._array_of(Download.array))
        monkeypatch.setattr(upload, "_sent", lambda host, _: self._copy_of(host))
        # Numbers of the host, which torch computes, too.
        for module in (device_tables, draws):
            monkeypatch.setattr(module, "draw_rows", _on_the_host(kinds.draw_rows))
        send = upload.Staging.send

        def send_numbers(staging: upload.Staging) -> None:
            staged = [each for group in staging._staged.values() for each in group]
            staging._device, device = _CPU, staging._device
            with unset_fake_temporarily(), monkeypatch.context() as patch:
                patch.setattr(upload, "_sent", lambda host, _: host)
                send(staging)
            if device.type == "cuda":
                for each in staged:
                    each._tensor = self._copy_of(each.tensor)

        monkeypatch.setattr(upload.Staging, "send", send_numbers)

    @contextlib.contextmanager
    def there(self) -> Iterator[None]:
        """The device is there."""
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        name = "_ZN3c104impl26device_guard_impl_registryE"
        guards = (ctypes.c_void_p * _NUM_TYPES).in_dll(library, name)
        assert guards[_META], "torch has changed how devices are numbered"
        former = guards[_CUDA]
        # What torch does to switch to a device: nothing, as on the one without numbers.
        guards[_CUDA] = guards[_META]
        try:
            with self._mode:
                yield
        finally:
            guards[_CUDA] = former

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """No copy may block the host."""
        with _Watch():
            yield

    def wait(self) -> None:
        frame: Any = sys._getframe(1)
        while not frame.f_globals["__name__"].startswith("tokasaurus"):
            frame = frame.f_back
        self.waits.append(frame.f_code.co_qualname)

    def _array_of(self, wait: Callable[[Download], Any]) -> Callable[[Download], Any]:
        """Numbers that have come: zeros."""

        def array(arriving: Download) -> Any:
            copy = arriving._copy
            with unset_fake_temporarily():
                arriving._copy = torch.empty(0)
                if isinstance(copy, FakeTensor):
                    copy = torch.zeros(copy.shape, dtype=copy.dtype)
                wait(arriving)
                arriving._copy = copy
                return copy.numpy()

        return array

    def _copy_of(self, host: Tensor) -> Tensor:
        with self._mode:
            return torch.empty(host.shape, dtype=host.dtype, device=DEVICE)


def _on_the_host(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        with unset_fake_temporarily():
            return function(*arguments)

    return call


class _Event:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda

    def record(self) -> None: ...

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self._cuda.wait()

    def elapsed_time(self, _: _Event) -> float:
        return 1.0


class _Stream:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def wait_stream(self, _: _Stream) -> None: ...

    def record_event(self) -> _Event:
        return _Event(self._cuda)


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function._schema.name.split("::")[1]
        if name in ("_to_copy", "to", "copy_", "copy"):
            source = args[1] if name.startswith("copy") else args[0]
            is_moved = source.device.type != result.device.type
            is_async = kwargs.get("non_blocking", name == "copy_" and args[2:] == (True,))
            assert not is_moved or is_async, f"{name} from {source.device} blocks the host"
        return result
