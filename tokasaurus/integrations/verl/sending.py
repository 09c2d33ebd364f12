"""Weights of a trainer's rank on their way to engines."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable, Mapping
from typing import Any

import ray

from tokasaurus.errors import ConfigError
from tokasaurus.integrations.trainer import BucketSender
from tokasaurus.integrations.verl.cartridges import is_loopback

__all__ = ["BUCKET_BYTES", "check_reach", "send_to"]

BUCKET_BYTES = 128 << 20
"""Half of what an engine takes in one body, unless its ``max_body_bytes`` is another."""


async def send_to(
    engines: Mapping[str, str | None], weights: Any, label: str | None, bucket_bytes: int
) -> None:
    """Sends weights to engines; without any, only reads them.

    Args:
        engines: their addresses and keys.
        weights: pairs of names and tensors, whose iterator may be asynchronous.
        label: of the new version.
        bucket_bytes: that are sent at once.

    Raises:
        RequestError, EngineError: an engine refuses them, or cannot be reached.
    """
    pairs: Iterable[Any] = (
        [pair async for pair in weights] if isinstance(weights, AsyncIterable) else weights
    )
    if not engines:
        for _ in pairs:
            pass
        return
    # In this thread: the iterator gathers tensors of a GPU, which a thread chooses for itself.
    (key, *_) = engines.values()
    with BucketSender([*engines], api_key=key, bucket_bytes=bucket_bytes) as sender:
        sender.send(pairs, label)


async def check_reach(url: str, server: Any) -> None:
    """Raises ConfigError if the server's engine has an address that means another machine here."""
    if is_loopback(url) and await server.__ray_call__.remote(_node_of) != _node_of(None):
        raise ConfigError(
            f"custom.tokasaurus_url={url} leads to one machine only, and this rank of the trainer"
            " is on another; name an address that all machines reach, or set"
            " custom.weight_sync=none if the model stays as it is"
        )


def _node_of(actor: Any) -> str:
    node: str = ray.get_runtime_context().get_node_id()
    return node
