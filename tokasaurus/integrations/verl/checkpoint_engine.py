"""The checkpoint engine ``tokasaurus``: weights of trainers that are not beside their rollout.

Importing this module registers it, which ``checkpoint_engine.custom_backend_module`` does. veRL's
other checkpoint engines join trainer and rollout in a process group. Here the first rank of the
trainer sends to all engines over HTTP, and the rollout's side has nothing to do.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import ray
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

from tokasaurus.integrations.verl.generation import step_label
from tokasaurus.integrations.verl.sending import BUCKET_BYTES, check_reach, send_to

__all__ = ["HttpCheckpointEngine"]

_SERVER = re.compile(r"tokasaurus_server_\d+.*")  # of the policy, not of teachers and rewards


@CheckpointEngineRegistry.register("tokasaurus")
class HttpCheckpointEngine(CheckpointEngine):  # type: ignore[misc]  # veRL is not typed
    """One rank's end.

    Args:
        bucket_size: bytes that are sent at once, at most.
        is_master: whether this is the first rank of the trainer, which sends.
        options: have no effect.
    """

    def __init__(self, bucket_size: int, is_master: bool = False, **options: Any) -> None:
        self._bucket_bytes = min(bucket_size, BUCKET_BYTES)
        self._is_master = is_master

    def prepare(self) -> dict[str, Any]:
        """There is nothing to prepare."""
        return {}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """No process group is built."""
        return {}, {}

    def init_process_group(self, **options: Any) -> None:
        """No process group is joined."""

    def finalize(self) -> None:
        """There is nothing to undo."""

    async def send_weights(self, weights: Any, global_steps: int | None = None) -> dict[str, Any]:
        """Sends the weights to every engine that a replica has. To gather them takes every rank.

        Raises:
            ConfigError: there is no replica, or its engine is out of reach.
            RequestError, EngineError: an engine refuses them, or cannot be reached.
        """
        if not self._is_master:
            await send_to({}, weights, None, self._bucket_bytes)
            return {}
        names = ray.util.list_named_actors()
        servers = [ray.get_actor(name) for name in names if _SERVER.fullmatch(name)]
        engines: dict[str, str | None] = {}
        for server in servers:
            url, key = await server.engine_access.remote()
            await check_reach(url, server)
            engines[url] = key
        await send_to(engines, weights, step_label(global_steps), self._bucket_bytes)
        for server in servers:
            await server.clear_kv_cache.remote()
            if global_steps is not None:
                await server.set_global_steps.remote(global_steps)
        return {}

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[Any]:
        """Nothing arrives here: engines have the weights already."""
        return
        yield
