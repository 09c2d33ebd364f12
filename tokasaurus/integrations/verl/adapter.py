"""``ServerAdapter``: the trainer's end of the rollout, which brings its weights to the engines."""

from __future__ import annotations

import logging
import os
from typing import Any

import ray
from verl.workers.rollout.base import BaseRollout

from tokasaurus.errors import ConfigError
from tokasaurus.integrations.verl.cartridges import is_on_this_machine
from tokasaurus.integrations.verl.generation import step_label
from tokasaurus.integrations.verl.options import RolloutOptions
from tokasaurus.integrations.verl.replica import server_name
from tokasaurus.integrations.verl.sending import BUCKET_BYTES, check_reach, send_to

__all__ = ["ServerAdapter"]

log = logging.getLogger(__name__)


class ServerAdapter(BaseRollout):  # type: ignore[misc]  # veRL is not typed
    """One rank of the trainer. The first rank of each replica sends for all of them.

    Args:
        config, model_config, device_mesh: as veRL gives them to every rollout.
        replica_rank: default the one that this rank belongs to.

    Raises:
        ConfigError: ``custom`` is wrong; names the key.
    """

    def __init__(
        self,
        config: Any,
        model_config: Any,
        device_mesh: Any,
        *args: Any,
        replica_rank: int = -1,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, model_config, device_mesh)
        self._options = RolloutOptions.of(self.config.custom)
        replica_size = (
            self.config.tensor_model_parallel_size
            * self.config.data_parallel_size
            * self.config.pipeline_model_parallel_size
        )
        rank = int(os.environ.get("RANK", "0"))
        self.replica_rank = replica_rank if replica_rank >= 0 else rank // replica_size
        self.is_leader_rank = rank % replica_size == 0
        self._server: Any = None
        if rank == 0:
            self._tell()

    async def resume(self, tags: list[str]) -> None:
        """Restores the engine's memory.

        Args:
            tags: "weights" or "kv_cache". Where new weights follow, the old ones are not read for
                them: the update brings weights back.
        """
        if self.is_leader_rank and self.config.free_cache_engine:
            is_awaited = self._options.sends_weights
            tags = [tag for tag in tags if not (tag == "weights" and is_awaited)]
            if tags:
                await self._handle().wake_up.remote(tags=tags)

    async def release(self) -> None:
        """Releases the engine's weights and KV cache."""
        if self.is_leader_rank and self.config.free_cache_engine:
            await self._handle().sleep.remote()

    async def update_weights(
        self,
        weights: Any,
        wire_format: str = "named_tensors",
        *,
        global_steps: int | None = None,
        peft_config: Any = None,
        base_sync_done: bool = True,
        **others: Any,
    ) -> None:
        """Replaces the weights of this replica's engine, unless ``custom.weight_sync`` is off.

        Args:
            weights: pairs of names and tensors, of the whole model.
            wire_format: "named_tensors".
            global_steps: the trainer's step, which labels the version.
            peft_config: of adapters that are not merged, which are refused.
            base_sync_done: false while the pairs are the base model's, before its adapters'.
            others: have no effect.

        Raises:
            ConfigError: the weights come in a form that the engine does not take.
            RequestError, EngineError: the engine refuses them, or cannot be reached.
        """
        if self._options.sends_weights:
            _check_form(wire_format, peft_config, base_sync_done)
            await self._send(weights, global_steps)
        if self.is_leader_rank:
            await self._handle().clear_kv_cache.remote()
            if global_steps is not None:
                await self._handle().set_global_steps.remote(global_steps)

    async def _send(self, weights: Any, global_steps: int | None) -> None:
        """Sends the weights, or only reads them: to gather them takes every rank of the trainer."""
        engines = {}
        if self.is_leader_rank and self._options.is_first_with_its_engine(self.replica_rank):
            url, key = await self._handle().engine_access.remote()
            await check_reach(url, self._handle())
            engines[url] = key
        size = self.config.checkpoint_engine.update_weights_bucket_megabytes << 20
        await send_to(engines, weights, step_label(global_steps), min(size, BUCKET_BYTES))

    def _handle(self) -> Any:
        """The server of this replica; veRL starts it after this object."""
        if self._server is None:
            self._server = ray.get_actor(server_name(self.replica_rank))
        return self._server

    def _tell(self) -> None:
        if self._options.sends_weights:
            how = "are sent to the engine after each step; custom.weight_sync=none would stop it"
        else:
            how = "are not sent to the engine: only its cartridges change"
            how += "; custom.weight_sync=http would send them"
        log.warning("weights %s", how)
        if self.config.free_cache_engine and not is_on_this_machine(self._options.url_of(0)):
            log.warning(
                "free_cache_engine=True: the engine gives its memory up while the trainer trains,"
                " and reads its weights again; False keeps them, where the engine has GPUs of its"
                " own"
            )


def _check_form(wire_format: str, peft_config: Any, base_sync_done: bool) -> None:
    if wire_format != "named_tensors":
        raise ConfigError(
            f"checkpoint_engine sends {wire_format!r}, and the rollout tokasaurus takes whole"
            " tensors: choose another checkpoint_engine.backend"
        )
    if peft_config is not None and base_sync_done:
        raise ConfigError(
            "the engine has no adapters of the trainer: set"
            " actor_rollout_ref.model.lora.merge=True, which merges them into the weights"
        )
