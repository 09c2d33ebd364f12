"""Process groups between a trainer, which is rank 0, and the workers of engines.

They are groups of torch.distributed beside the default one, made as trainers make them for SGLang:
a store at the trainer's address, and in it the keys of ``_new_process_group_helper`` behind the
group's name. So both ends need versions of torch that agree on these keys.

Nothing here waits without a limit, or kills the process when the other end is gone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

from tokasaurus.errors import EngineError

__all__ = ["GroupPlace", "WeightsGroup", "free_address"]

# How often a thread that waits looks whether it still should.
_LOOK_S = 0.1
_NCCL_LOOK_S = 0.001
_SIOCGIFADDR = 0x8915

# Otherwise NCCL's watchdog ends the process when a peer is gone.
_NCCL_SURVIVES = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}


@dataclass(frozen=True)
class GroupPlace:
    """Where a group meets, and the place of one rank in it.

    Attributes:
        name: of the group, the same at all ranks.
        address: rank 0 listens there.
        port: the same; 0 lets rank 0 choose.
        rank: of this process.
        world_size: ranks of the group.
        backend: "gloo" or "nccl".
    """

    name: str
    address: str
    port: int
    rank: int
    world_size: int
    backend: str


class WeightsGroup:
    """One rank's end of a group. Only one thread at a time uses it.

    Args:
        place: of this rank.
        timeout_s: for all ranks to come.
        is_wanted: asked while it waits; False ends the waiting.
        on_listening: of rank 0: called with the port once others can come, before it waits.

    Raises:
        EngineError: the others have not come in time, or it is not wanted any more.
    """

    def __init__(
        self,
        place: GroupPlace,
        timeout_s: float,
        is_wanted: Callable[[], bool] = lambda: True,
        on_listening: Callable[[int], None] = lambda port: None,
    ) -> None:
        self.place = place
        self._is_wanted = is_wanted
        deadline = time.monotonic() + timeout_s
        store, own = self._meet(deadline, on_listening)
        left = timedelta(seconds=max(1.0, deadline - time.monotonic()))
        store.set_timeout(left)
        interface = _interface_of(own)
        environment = {} if interface is None else {"GLOO_SOCKET_IFNAME": interface}
        if place.backend == "gloo":
            store = _WatchedStore(store, place, deadline, is_wanted)
        # Torch does not keep an object of Python alive, and with rank 0's the others lose the store
        # from which they may still read.
        self._store = store
        try:
            self._group = _new_group(place, store, left, environment)
        except (RuntimeError, ValueError) as error:
            raise EngineError(
                f"not all {place.world_size} ranks of the group {place.name!r} came together"
                f" ({_first_line(error)})"
            ) from None

    def broadcast(self, tensor: Tensor, timeout_s: float) -> None:
        """Sends a tensor from rank 0, or receives it elsewhere.

        Args:
            tensor: contiguous; of the host for gloo, of a CUDA device for NCCL.
            timeout_s: for this tensor.

        Raises:
            EngineError: another rank is gone, or the time is up, or it is not wanted any more.
                The group is of no use any more.
        """
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.asyncOp = 0, 0, True
        options.timeout = timedelta(seconds=timeout_s)
        deadline = time.monotonic() + timeout_s
        try:
            work = self._group.broadcast([tensor], options)
            while not self._waited(work):
                if not self._is_wanted():
                    raise EngineError(f"the group {self.place.name!r} was left meanwhile")
                if time.monotonic() > deadline:
                    raise EngineError(f"the tensor has not come within {timeout_s:g} s")
        except RuntimeError as error:
            if time.monotonic() > deadline:  # the group has noticed it before us
                raise EngineError(f"the tensor has not come within {timeout_s:g} s") from None
            raise EngineError(
                f"another rank of the group {self.place.name!r} is gone, or sends something else"
                f" ({_first_line(error)})"
            ) from None

    def _waited(self, work: Any) -> bool:
        """Waits for a moment; whether the work is done."""
        if self.place.backend == "nccl":
            time.sleep(_NCCL_LOOK_S)
        else:
            try:
                work.wait(timedelta(seconds=_LOOK_S))
            except RuntimeError:
                if work.is_completed():
                    raise
        if not work.is_completed():
            return False
        work.wait()
        return True

    def close(self, on_left: Callable[[], None] = lambda: None) -> None:
        """Leaves the group. Waits for what a broadcast still does, until its time is up.

        Args:
            on_left: called before it waits: from then on there may be another group of this name.
        """
        if self.place.backend == "nccl":
            with contextlib.suppress(RuntimeError):
                self._group.abort()
        with contextlib.suppress(RuntimeError, KeyError):
            dist.destroy_process_group(self._group)
        on_left()
        del self._group, self._store

    def _meet(self, deadline: float, on_listening: Callable[[int], None]) -> tuple[Any, str]:
        """The store of the group, and this machine's address that the others see."""
        place = self.place
        left = timedelta(seconds=max(1.0, deadline - time.monotonic()))
        try:
            if place.rank == 0:
                store = dist.TCPStore(  # type: ignore[attr-defined]
                    place.address, place.port, place.world_size, True, left, wait_for_workers=False
                )
                on_listening(store.port)
                return store, place.address
            own = self._await_listener(deadline)
            url = f"tcp://{_bracketed(place.address)}:{place.port}"
            meeting = rendezvous(url, place.rank, place.world_size, timeout=left)
            store, _, _ = next(meeting)
            return store, own
        except (RuntimeError, OSError) as error:
            raise EngineError(
                f"the group {place.name!r} cannot meet at {place.address}:{place.port}"
                f" ({_first_line(error)})"
            ) from None

    def _await_listener(self, deadline: float) -> str:
        """Waits until rank 0 listens; returns this machine's address on the way there."""
        place = self.place
        while True:
            if not self._is_wanted():
                raise EngineError(f"the group {place.name!r} was left meanwhile")
            try:
                with socket.create_connection((place.address, place.port), timeout=1.0) as found:
                    own: str = found.getsockname()[0]
                    return own
            except OSError as error:
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"no trainer listens at {place.address}:{place.port} ({error})"
                    ) from None
            time.sleep(_LOOK_S)


class _WatchedStore(c10d.Store):
    """A store in which a rank waits for another one only as long as the group is wanted.

    The store of torch waits within C++ to the end of its time.

    Args:
        store: of the group.
        place: of this rank.
        deadline: for all ranks to come, of ``time.monotonic``.
        is_wanted: asked while it waits.
    """

    def __init__(
        self, store: Any, place: GroupPlace, deadline: float, is_wanted: Callable[[], bool]
    ) -> None:
        super().__init__()
        self._store, self._place = store, place
        self._deadline, self._is_wanted = deadline, is_wanted

    def set(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        self.wait([key])
        value: bytes = self._store.get(key)
        return value

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        while not self._store.check(keys):
            if not self._is_wanted():
                raise EngineError(f"the group {self._place.name!r} was left meanwhile")
            if time.monotonic() > self._deadline:
                raise RuntimeError("the time is up")
            time.sleep(_LOOK_S)


def free_address(towards: str) -> str:
    """This machine's address that another one reaches it by.

    Args:
        towards: the name or address of the other one.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))  # sends nothing
        own: str = probe.getsockname()[0]
        return own


def _new_group(place: GroupPlace, store: Any, timeout: timedelta, more: Mapping[str, str]) -> Any:
    # NCCL's own limit would end the process; ours comes before.
    limit = timedelta(days=365) if place.backend == "nccl" else timeout
    environment = {**more, **(_NCCL_SURVIVES if place.backend == "nccl" else {})}
    with _environment.has(environment):
        group, _ = c10d._new_process_group_helper(
            place.world_size,
            place.rank,
            [],
            place.backend,
            dist.PrefixStore(place.name, store),  # type: ignore[attr-defined]
            group_name=place.name,  # type: ignore[arg-type]  # its type is newer than torch 2.8
            timeout=limit,
        )
        ranks = {rank: rank for rank in range(place.world_size)}
        c10d._world.pg_group_ranks[group] = ranks
        return group


class _Environment:
    """Variables of this process, which groups read as they are made.

    Those that need the same ones are made at the same time: to make a group may take as long as its
    limit, where another rank does not come, and the next one must not wait for that.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._now: Mapping[str, str] = {}
        self._before: Mapping[str, str | None] = {}
        self._num_users = 0

    @contextlib.contextmanager
    def has(self, variables: Mapping[str, str]) -> Iterator[None]:
        """The process has these variables inside."""
        with self._changed:
            self._changed.wait_for(lambda: not self._num_users or self._now == variables)
            if not self._num_users:
                self._now = variables
                self._before = {name: os.environ.get(name) for name in variables}
                os.environ.update(variables)
            self._num_users += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_users -= 1
                if not self._num_users:
                    self._restore()
                    self._changed.notify_all()

    def _restore(self) -> None:
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


_environment = _Environment()


def _interface_of(address: str) -> str | None:
    """The network interface of an IPv4 address of this machine; None if it is not found."""
    if not sys.platform.startswith("linux"):
        return None
    import fcntl

    try:
        wanted = socket.inet_aton(socket.gethostbyname(address))
    except OSError:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(sock, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has no such address
                continue
            if found[20:24] == wanted:
                return name
    return None


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
