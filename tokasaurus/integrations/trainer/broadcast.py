"""Weights by broadcast, in a process group of the trainer and all workers of all engines."""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from os import PathLike
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from tokasaurus.client import AsyncClient, RetryPolicy, WeightsVersion
from tokasaurus.errors import ConfigError, EngineError, TokasaurusError
from tokasaurus.integrations.trainer.buckets import grouped
from tokasaurus.integrations.trainer.sender import (
    Engines,
    NamedTensors,
    WeightsSender,
    whole_tensors,
)
from tokasaurus.weights_groups import GroupPlace, WeightsGroup, free_address

__all__ = ["BroadcastSender"]

log = logging.getLogger(__name__)

_BROADCAST_BYTES = 256 << 20
_LOOK_S = 0.05
# A worker that refuses leaves the group, and its engine says why a moment later.
_REASON_S = 5.0
_END_S = 5.0  # more than a thread needs to see that its group is not wanted


class BroadcastSender(WeightsSender):
    """Broadcasts weights, so that a byte leaves the trainer a few times for any number of workers.

    The group is made with the first update, and again after one that failed. The network between
    trainer and workers must be trusted: torch.distributed knows no keys.

    Args:
        urls: of one engine or of several, which get the same weights.
        api_key: an admin key, where the engines have one.
        backend: "nccl" between CUDA devices, or "gloo"; None is nccl if the trainer has one.
        address: of this machine, as the engines' machines reach it; None asks the system for the
            address on the way to the first engine.
        port: to listen on; 0 takes a free one.
        bucket_bytes: of one broadcast.
        timeout_s: for all workers to join, and for each broadcast.
        retry: when requests are sent again that can be repeated; default ``RetryPolicy()``.
        ca_file: PEM file of the certificates to trust.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        api_key: str | None = None,
        backend: str | None = None,
        address: str | None = None,
        port: int = 0,
        bucket_bytes: int = _BROADCAST_BYTES,
        timeout_s: float = 300.0,
        retry: RetryPolicy | None = None,
        ca_file: str | PathLike[str] | None = None,
    ) -> None:
        if backend not in (None, "gloo", "nccl"):
            raise ConfigError(f"backend={backend!r} must be gloo or nccl")
        if bucket_bytes < 1:
            raise ConfigError(f"bucket_bytes={bucket_bytes} must be at least 1")
        self._backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
        self._device = torch.device(
            torch.cuda.current_device() if self._backend == "nccl" else "cpu"
        )
        self._address, self._port = address, port
        self._bucket_bytes, self._timeout_s = bucket_bytes, timeout_s
        self._engines = Engines(urls, api_key=api_key, timeout_s=None, retry=retry, ca_file=ca_file)
        self._name = ""
        self._group: WeightsGroup | None = None

    def send(self, tensors: NamedTensors, label: str | None = None) -> list[int]:
        """Implements ``WeightsSender``."""
        group = self._group or self._connect()
        try:
            return self._send(group, tensors, label)
        except BaseException:
            self._leave()
            raise

    def _send(self, group: WeightsGroup, tensors: NamedTensors, label: str | None) -> list[int]:
        engines, started, num_bytes = self._engines, time.perf_counter(), 0
        engines.run(lambda _, client: client.weights.start())
        for bucket in grouped(whole_tensors(tensors), self._bucket_bytes):
            flat = _flat(bucket, self._device)
            receiving = engines.begin(self._receiving(bucket))
            self._watched = receiving
            try:
                group.broadcast(flat, self._timeout_s)
            except EngineError:
                _raise_failure(receiving, _REASON_S)  # the engine's reason says more
                raise
            receiving.result()
            num_bytes += len(flat)
        sent = time.perf_counter()
        versions: list[WeightsVersion] = engines.run(lambda _, client: client.weights.finish(label))
        log.info(
            "broadcast %.1f MB in %.2f s (%.0f MB/s); the engines took them in %.2f s",
            num_bytes / 1e6,
            sent - started,
            num_bytes / 1e6 / (sent - started),
            time.perf_counter() - sent,
        )
        return [each.version for each in versions]

    def close(self) -> None:
        self._leave()
        self._engines.close()

    # --- the group --------------------------------------------------------------------------------

    def _connect(self) -> WeightsGroup:
        """Makes the group. All workers are in it afterwards."""
        sizes = self._engines.run(lambda _, client: client.weights.world_size())
        firsts = list(itertools.accumulate(sizes, initial=1))
        self._name = f"weights-{secrets.token_hex(4)}"
        address = self._address or free_address(self._host)
        place = GroupPlace(self._name, address, self._port, 0, firsts[-1], self._backend)
        making = _Making(place, self._timeout_s, self._is_awaited)
        port = making.port()
        self._watched = self._engines.begin(self._joining(address, port, firsts))
        try:
            self._group = making.result(self._watched)
            self._watched.result()
        except BaseException:
            making.end()
            self._leave()
            raise
        log.info("%d workers are in the group %s", firsts[-1] - 1, self._name)
        return self._group

    def _joining(self, address: str, port: int, firsts: Sequence[int]) -> Any:
        def join(number: int, client: AsyncClient) -> Any:
            return client.weights.join_group(
                self._name,
                address,
                port,
                first_rank=firsts[number],
                world_size=firsts[-1],
                backend=self._backend,
                timeout_s=self._timeout_s,
            )

        return join

    def _receiving(self, bucket: dict[str, Tensor]) -> Any:
        dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in bucket.values()]
        shapes = [list(tensor.shape) for tensor in bucket.values()]

        def receive(number: int, client: AsyncClient) -> Any:
            return client.weights.receive(
                self._name, list(bucket), dtypes, shapes, timeout_s=self._timeout_s
            )

        return receive

    def _is_awaited(self) -> bool:
        """Whether no engine has refused what it was asked for."""
        watched = self._watched
        return watched is None or not watched.done() or watched.exception() is None

    def _leave(self) -> None:
        group, self._group, self._watched = self._group, None, None
        if self._name:
            name, self._name = self._name, ""
            with contextlib.suppress(TokasaurusError):
                self._engines.run(lambda _, client: client.weights.leave_group(name))
        if group is not None:
            # It waits for a broadcast that nobody takes any more, until its time is up.
            threading.Thread(target=group.close, name="leaving", daemon=True).start()

    @property
    def _host(self) -> str:
        return urlsplit(self._engines.clients[0].base_url).hostname or "127.0.0.1"

    _watched: Future[Any] | None = None  # what the engines were asked for last


class _Making:
    """Makes a group in a thread, while the engines are asked to join it."""

    def __init__(self, place: GroupPlace, timeout_s: float, is_awaited: Any) -> None:
        self._is_wanted = True
        self._port: Future[int] = Future()
        self._group: Future[WeightsGroup] = Future()
        self._is_awaited = is_awaited
        self._thread = threading.Thread(
            target=self._run, args=(place, timeout_s), name="weights-group", daemon=True
        )
        self._thread.start()

    def port(self) -> int:
        """Where the trainer listens."""
        return self._port.result()

    def result(self, joining: Future[Any]) -> WeightsGroup:
        """The group. Raises what the engines answer, if one of them refuses."""
        while not self._group.done():
            _raise_failure(joining)
            time.sleep(_LOOK_S)
        return self._group.result()

    def end(self) -> None:
        """The group is not wanted any more. The thread ends soon.

        A program that ends while a thread waits within torch may be aborted.
        """
        self._is_wanted = False
        self._thread.join(_END_S)

    def _run(self, place: GroupPlace, timeout_s: float) -> None:
        try:
            group = WeightsGroup(
                place,
                timeout_s,
                lambda: self._is_wanted and bool(self._is_awaited()),
                self._port.set_result,
            )
        except Exception as error:
            if not self._port.done():
                self._port.set_exception(error)
            self._group.set_exception(error)
            return
        self._group.set_result(group)
        if not self._is_wanted:
            group.close()


def _raise_failure(asked: Future[Any], wait_s: float = 0.0) -> None:
    """Raises what an engine has answered, or answers soon, if it has refused."""
    try:
        error = asked.exception(wait_s)
    except FutureTimeoutError:
        return
    if error is not None:
        raise error


def _flat(bucket: dict[str, Tensor], device: torch.device) -> Tensor:
    """The bytes of tensors, one behind the other."""
    parts = [tensor.reshape(-1).view(torch.uint8).to(device) for tensor in bucket.values()]
    return torch.cat(parts)
