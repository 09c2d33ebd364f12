"""Weights in buckets over HTTP: from any machine that reaches the engine, and nothing else."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from os import PathLike
from typing import Any

from safetensors.torch import save
from torch import Tensor

from tokasaurus.client import AsyncClient, RetryPolicy, WeightsVersion
from tokasaurus.errors import ConfigError, TokasaurusError
from tokasaurus.integrations.trainer.sender import (
    Engines,
    NamedTensors,
    WeightsSender,
    whole_tensors,
)

__all__ = ["BUCKET_BYTES", "BucketSender", "grouped"]

log = logging.getLogger(__name__)

BUCKET_BYTES = 128 << 20
"""Half of what an engine takes in one body, unless its ``max_body_bytes`` is another."""


class BucketSender(WeightsSender):
    """Sends weights as ``/v1/weights/updates`` takes them, with the checksum of each bucket.

    A bucket is made while the one before it is on its way. What breaks is sent again. An update
    that another sender has left unfinished is dropped: one trainer at a time sends to an engine.

    Args:
        urls: of one engine or of several, which get the same weights.
        api_key: an admin key, where the engines have one.
        bucket_bytes: size of a bucket; a tensor that is larger has one of its own.
        timeout_s: for each bucket, and for the commit.
        retry: when requests are sent again; default ``RetryPolicy()``.
        ca_file: PEM file of the certificates to trust.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        api_key: str | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        timeout_s: float = 600.0,
        retry: RetryPolicy | None = None,
        ca_file: str | PathLike[str] | None = None,
    ) -> None:
        if bucket_bytes < 1:
            raise ConfigError(f"bucket_bytes={bucket_bytes} must be at least 1")
        self._bucket_bytes = bucket_bytes
        self._engines = Engines(
            urls, api_key=api_key, timeout_s=timeout_s, retry=retry, ca_file=ca_file
        )

    def send(self, tensors: NamedTensors, label: str | None = None) -> list[int]:
        """Implements ``WeightsSender``."""
        engines = self._engines
        updates = engines.run(lambda _, client: client.weights.begin(label, replace=True))
        try:
            return self._send(updates, tensors)
        except BaseException:
            with contextlib.suppress(TokasaurusError):
                engines.run(lambda number, client: client.weights.discard(updates[number]))
            raise

    def _send(self, updates: Sequence[str], tensors: NamedTensors) -> list[int]:
        engines, started = self._engines, time.perf_counter()
        num_buckets = num_bytes = 0
        under_way: Future[Any] | None = None
        for bucket in grouped(whole_tensors(tensors), self._bucket_bytes):
            # Tensors of a file must not share memory: a tied head would, with the embedding.
            content = save({name: each.to("cpu", copy=True) for name, each in bucket.items()})
            if under_way is not None:
                under_way.result()
            under_way = engines.begin(_sending(updates, num_buckets, content))
            num_buckets += 1
            num_bytes += len(content)
        if under_way is None:
            raise ConfigError("tensors has no tensor")
        under_way.result()
        sent = time.perf_counter()

        def commit(number: int, client: AsyncClient) -> Any:
            return client.weights.commit(updates[number], num_buckets)

        versions: list[WeightsVersion] = engines.run(commit)
        log.info(
            "sent %.1f MB in %d buckets in %.2f s (%.0f MB/s); the engines took them in %.2f s",
            num_bytes / 1e6,
            num_buckets,
            sent - started,
            num_bytes / 1e6 / (sent - started),
            time.perf_counter() - sent,
        )
        return [each.version for each in versions]

    def close(self) -> None:
        self._engines.close()


def grouped(
    tensors: Iterator[tuple[str, Tensor]], bucket_bytes: int
) -> Iterator[dict[str, Tensor]]:
    """Tensors in groups of about this size, in order."""
    bucket: dict[str, Tensor] = {}
    num_bytes = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if bucket and num_bytes + size > bucket_bytes:
            yield bucket
            bucket, num_bytes = {}, 0
        bucket[name] = tensor
        num_bytes += size
    if bucket:
        yield bucket


def _sending(updates: Sequence[str], index: int, content: bytes) -> Any:
    def send(number: int, client: AsyncClient) -> Any:
        return client.weights.send(updates[number], index, content)

    return send
