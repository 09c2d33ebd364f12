"""The groups of a trainer: each has a thread, which joins it and receives tensors beside batches.

Owns the threads, and what has come of the next weights. The worker's own thread checks what is
asked for, and takes the tensors once all have come.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from tokasaurus.errors import EngineError, ModelError
from tokasaurus.model.parallel.ranks import Ranks
from tokasaurus.model.weights.staged import StagedWeights
from tokasaurus.model.weights.weights import Weights
from tokasaurus.protocol.commands import JoinWeightsGroup, ReceiveWeights, TransferDone
from tokasaurus.weights_groups import GroupPlace, WeightsGroup

__all__ = ["Report", "WeightsGroups"]

log = logging.getLogger(__name__)

Report: TypeAlias = Callable[[TransferDone], None]
"""Tells the manager how a transfer ended. Any thread calls it."""

_Kind: TypeAlias = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape


class WeightsGroups:
    """The groups of one worker.

    Args:
        weights: of the model, which get what comes.
        ranks: of the replica.
        device: of the worker; NCCL's tensors come there.
        replica: the number of the replica.
        report: None where nothing can be told later: then no group can be joined.

    Attributes:
        staged: what has come of the next weights.
    """

    def __init__(
        self,
        weights: Weights,
        ranks: Ranks,
        device: torch.device,
        replica: int = 0,
        report: Report | None = None,
    ) -> None:
        self.staged = StagedWeights(weights)
        self._ranks, self._device, self._replica = ranks, device, replica
        self._report = report
        self._members: dict[str, _Member] = {}  # by the name of the group

    def check_join(self, action: JoinWeightsGroup) -> None:
        """Raises ModelError if this worker cannot join a group."""
        if self._report is None:
            raise ModelError("an engine without processes of its own joins no group of a trainer")
        if self._backend(action.backend) == "nccl" and self._device.type != "cuda":
            raise ModelError(
                f"backend is nccl, which needs CUDA devices, and this engine runs on device="
                f"{self._device.type}; make the group with gloo"
            )
        if not torch.distributed.is_available():
            raise ModelError("this torch is built without torch.distributed")

    def join(self, number: int, action: JoinWeightsGroup) -> None:
        """Begins to join a group, which ``check_join`` has nothing against."""
        before = self._members.get(action.group)
        self.leave(action.group)
        place = GroupPlace(
            action.group,
            action.address,
            action.port,
            action.first_rank + self._replica * self._ranks.size + self._ranks.rank,
            action.world_size,
            self._backend(action.backend),
        )
        assert self._report is not None
        member = _Member(place, self._device, self.staged, self._ranks, self._report)
        self._members[action.group] = member
        member.start(number, action.timeout_s, before)

    def check_receive(self, action: ReceiveWeights) -> None:
        """Raises ModelError if these tensors cannot come, or cannot be part of the weights."""
        member = self._members.get(action.group)
        if member is None or not member.is_joined:
            raise ModelError(
                f"this worker is in no group {action.group!r}: it was never joined, or was left, or"
                " the worker has been started again; make the group anew"
            )
        if len(set(action.names)) != len(action.names):
            raise ModelError("a tensor is named twice")
        for name, dtype, shape in zip(action.names, action.dtypes, action.shapes, strict=True):
            self.staged.check(name, shape, _dtype(name, dtype))

    def receive(self, number: int, action: ReceiveWeights) -> None:
        """Begins to receive tensors, which ``check_receive`` has nothing against."""
        self._members[action.group].receive(number, action)

    def leave(self, group: str) -> None:
        """Ends a group and what it does, and drops what has come of the next weights."""
        member = self._members.pop(group, None)
        if member is not None:
            member.leave()
            self.staged.clear()

    def _backend(self, asked: str) -> str:
        return asked or ("nccl" if self._device.type == "cuda" else "gloo")


class _Member:
    """This worker's place in one group, and its thread."""

    def __init__(
        self,
        place: GroupPlace,
        device: torch.device,
        staged: StagedWeights,
        ranks: Ranks,
        report: Report,
    ) -> None:
        self._place, self._device, self._staged = place, device, staged
        self._ranks, self._report = ranks, report
        self._jobs: queue.SimpleQueue[tuple[int, ReceiveWeights] | None] = queue.SimpleQueue()
        self._is_left = threading.Event()
        self._has_no_name = threading.Event()  # torch knows no group of this name from here
        self._has_no_name.set()
        self._lock = threading.Lock()
        self._failure: str | None = None  # why the thread has ended
        self.is_joined = False

    def start(self, number: int, timeout_s: float, before: _Member | None) -> None:
        """Begins to join.

        Args:
            number: of the control.
            timeout_s: for all ranks to come.
            before: a member of another group of this name, which it has left.
        """

        # A daemon, since a broadcast ends at its limit only, which a worker does not wait for.
        threading.Thread(
            target=self._run,
            args=(number, timeout_s, before),
            name=f"weights-{self._place.name}",
            daemon=True,
        ).start()

    def receive(self, number: int, action: ReceiveWeights) -> None:
        with self._lock:
            if self._failure is None:
                self._jobs.put((number, action))
                return
        self._tell(number, self._failure)

    def leave(self) -> None:
        """The thread ends soon, and reports nothing more."""
        self.is_joined = False
        self._is_left.set()
        self._jobs.put(None)

    def wait_for_name(self, limit_s: float) -> None:
        """Waits, soon after ``leave``, until there may be another group of this name."""
        self._has_no_name.wait(limit_s)

    def _is_wanted(self) -> bool:
        return not self._is_left.is_set()

    def _run(self, number: int, timeout_s: float, before: _Member | None) -> None:
        if before is not None:
            before.wait_for_name(timeout_s)
        if self._device.type != "cuda":
            self._work(number, timeout_s)
            return
        torch.cuda.set_device(self._device)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):  # not that of the batches
            self._work(number, timeout_s)

    def _work(self, number: int, timeout_s: float) -> None:
        group = None
        numbers = [number]  # of what is not told yet
        try:
            group = WeightsGroup(self._place, timeout_s, self._is_wanted)
            self._has_no_name.clear()
            self.is_joined = self._is_wanted()
            log.info(
                "rank %d of %d in the group %r of a trainer at %s:%d",
                self._place.rank,
                self._place.world_size,
                self._place.name,
                self._place.address,
                self._place.port,
            )
            self._tell(numbers.pop())
            while (job := self._jobs.get()) is not None and self._is_wanted():
                numbers.append(job[0])
                self._receive(group, job[1])
                self._tell(numbers.pop())
        except Exception as error:
            known = isinstance(error, EngineError | ModelError)
            self._fail(numbers, str(error) if known else f"{type(error).__name__}: {error}")
        finally:
            if group is not None:
                group.close(self._has_no_name.set)

    def _fail(self, numbers: list[int], reason: str) -> None:
        with self._lock:
            self._failure, self.is_joined = reason, False
            while not self._jobs.empty():
                job = self._jobs.get()
                numbers += [] if job is None else [job[0]]
        if self._is_wanted():
            log.warning("the group %r of a trainer is of no use: %s", self._place.name, reason)
        for number in numbers:
            self._tell(number, reason)

    def _tell(self, number: int, error: str | None = None) -> None:
        if not self._is_wanted():
            return
        is_whole = error is None and self._staged.is_whole
        self._report(TransferDone(number, self._ranks.rank, self._ranks.size, error, is_whole))

    def _receive(self, group: WeightsGroup, action: ReceiveWeights) -> None:
        update = self._staged.begin(set(action.names), anew=action.begins_anew)
        deadline = time.monotonic() + action.timeout_s
        kinds = [
            (_dtype(name, dtype), shape)
            for name, dtype, shape in zip(action.names, action.dtypes, action.shapes, strict=True)
        ]
        receive = self._receive_flat if action.is_flat else self._receive_each
        for name, tensor in zip(action.names, receive(group, kinds, deadline), strict=True):
            _check_end(tensor)
            self._staged.put(name, tensor, update)

    def _receive_each(
        self, group: WeightsGroup, kinds: Sequence[_Kind], deadline: float
    ) -> Iterator[Tensor]:
        for dtype, shape in kinds:
            tensor = torch.empty(shape, dtype=dtype, device=self._home)
            _mark_end(tensor)
            group.broadcast(tensor, _left(deadline))
            yield tensor

    def _receive_flat(
        self, group: WeightsGroup, kinds: Sequence[_Kind], deadline: float
    ) -> Iterator[Tensor]:
        sizes = [dtype.itemsize * prod(shape) for dtype, shape in kinds]
        flat = torch.empty(sum(sizes), dtype=torch.uint8, device=self._home)
        for end in itertools.accumulate(sizes):
            _mark_end(flat[:end])
        group.broadcast(flat, _left(deadline))
        start = 0
        for (dtype, shape), size in zip(kinds, sizes, strict=True):
            part = flat[start : start + size]
            start += size
            if part.storage_offset() % dtype.itemsize:
                part = part.clone()
            yield part.view(dtype).view(shape)

    @property
    def _home(self) -> torch.device:
        """Where tensors arrive."""
        return self._device if self._place.backend == "nccl" else torch.device("cpu")


def _dtype(name: str, dtype: str) -> torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ModelError(f"tensor {name} has dtype {dtype!r}, which torch does not know")
    return found


def _left(deadline: float) -> float:
    return max(0.1, deadline - time.monotonic())


_MARK_BYTES = 8


def _mark_end(tensor: Tensor) -> None:
    """Makes the last number NaN, all of whose bits are set.

    A broadcast by gloo of fewer bytes than were announced succeeds, and leaves the rest as it was.
    """
    tensor.view(-1).view(torch.uint8)[-_MARK_BYTES:].fill_(255)


def _check_end(tensor: Tensor) -> None:
    """Checks that the mark is gone."""
    if not tensor.dtype.is_floating_point or not tensor.numel():
        return
    if bool((tensor.view(-1)[-1:].view(torch.uint8) == 255).all()):
        raise EngineError("the trainer sends fewer bytes than it has announced, or NaN")
