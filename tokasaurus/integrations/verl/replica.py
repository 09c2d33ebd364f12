"""``TokasaurusReplica``: what veRL starts and stops, which here starts no engine but finds one."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.workers.rollout.replica import RolloutMode, RolloutReplica

from tokasaurus.client.address import Address
from tokasaurus.client.cartridges import AsyncCartridges
from tokasaurus.client.connection import Connection
from tokasaurus.client.retrying import RetryPolicy
from tokasaurus.integrations.verl.cartridges import (
    CartridgeUploads,
    is_loopback,
    shares_no_disk,
)
from tokasaurus.integrations.verl.idle_worker import IdleWorker
from tokasaurus.integrations.verl.options import RolloutOptions
from tokasaurus.integrations.verl.server import TokasaurusHttpServer, key_from_environment

__all__ = ["TokasaurusReplica", "server_name"]

log = logging.getLogger(__name__)


class TokasaurusReplica(RolloutReplica):  # type: ignore[misc]  # veRL is not typed
    """One replica of the rollout: a server actor in front of an engine that runs elsewhere.

    Args:
        args, kwargs: as veRL gives them to every replica.

    Raises:
        ConfigError: ``custom`` is wrong; names the key.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._options = RolloutOptions.of(self.config.custom)
        self._url = self._options.url_of(self.replica_rank)
        self._key = key_from_environment()
        self._num_trainers: int | None = None  # ranks of a trainer whose replica this is

    def rollout_worker_use_gpu(self) -> bool:
        """No: the engine has the GPUs."""
        return False

    async def init_hybrid(self, worker_group: Any) -> None:
        """Starts beside the ranks of a trainer."""
        self._num_trainers = worker_group.world_size
        await super().init_hybrid(worker_group)

    async def init_standalone(self) -> None:
        """Starts without the workers and GPUs that veRL would reserve."""
        self.rollout_mode = RolloutMode.STANDALONE
        # veRL's checkpoint engines want a worker of each replica.
        self.workers = [ray.remote(IdleWorker).options(num_cpus=0).remote()]
        await self.launch_servers()

    async def init_colocated(self, resource_pool: Any) -> None:
        """Starts without the workers that veRL would put beside the trainer's."""
        self.rollout_mode = RolloutMode.COLOCATED
        self.resource_pool = resource_pool
        await self.launch_servers()

    async def launch_servers(self) -> None:
        """Starts the server actor, which waits for its engine.

        Raises:
            EngineError: the engine does not serve.
            AccessDenied: it wants another key.
        """
        self._tell()
        options: dict[str, Any] = {}
        if is_loopback(self._url):  # of the machine on which the trainer was started
            node = ray.get_runtime_context().get_node_id()
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
        server = (
            ray.remote(TokasaurusHttpServer)
            .options(
                name=server_name(self.replica_rank, self._kind, self._suffix),
                num_cpus=0,
                max_concurrency=self.max_concurrency,
                **options,
            )
            .remote(
                config=self.config,
                tokasaurus_url=self._url,
                cartridges=[dict(each) for each in self._options.cartridges],
                max_retries=self._options.max_retries,
                base_timeout=self._options.base_timeout,
                retry_delay=self._options.retry_delay,
                startup_timeout=self._options.startup_timeout,
                cartridge_upload=self._options.cartridge_upload,
                api_key=self._key,
                rollout_mode=self.rollout_mode.value,
                is_first_with_its_engine=self._options.is_first_with_its_engine(self.replica_rank),
                max_connections=self.max_concurrency,
            )
        )
        try:
            self._server_address = await server.launch_server.remote(self._forward_on())
        except BaseException:
            ray.kill(server)  # or its name stays taken, as long as somebody looks at the error
            raise
        self._server_handle = server
        self.servers = [server]

    async def update_cartridges(self, cartridges: Any) -> None:
        """Requests that come from now on have these cartridges, and no others.

        Args:
            cartridges: a list of ``{"id", "source", "force_redownload"}``.

        Raises:
            ConfigError, RequestError, EngineError: one of them is wrong, or cannot be uploaded.
        """
        await asyncio.gather(*[each.update_cartridges.remote(cartridges) for each in self.servers])

    async def sync_cartridge(self, path: str) -> None:
        """Requests that come from now on have the cartridge in this file, and no other.

        Where the engine is on another machine, the file is uploaded, once for each content.

        Args:
            path: of a .pt or safetensors file that is complete.

        Raises:
            RequestError, EngineError: it is no cartridge for the engine, or cannot be uploaded.
        """
        spec: dict[str, Any] = {"id": str(path), "source": "local", "force_redownload": True}
        if shares_no_disk(self._url, self._options.cartridge_upload):
            name = await self._uploaded(str(path))
            # A file that is not here may be where the server is.
            spec = spec if name is None else {"id": name, "source": "local"}
        await self.update_cartridges([spec])

    async def _uploaded(self, path: str) -> str | None:
        connection = Connection(
            Address.of(self._url, self._key),
            retry=RetryPolicy(
                max_retries=self._options.max_retries, starting_delay_s=self._options.retry_delay
            ),
            max_connections=1,
            connect_timeout_s=10.0,
        )
        try:
            return await CartridgeUploads(AsyncCartridges(connection, None)).uploaded(path)
        finally:
            await connection.close()

    @property
    def _kind(self) -> str:
        if self.is_reward_model:
            return "reward_"
        return "teacher_" if getattr(self, "is_teacher_model", False) else ""

    @property
    def _suffix(self) -> str:
        return getattr(self, "name_suffix", "")

    def _forward_on(self) -> str | None:
        """The address for a port of its own; None if the engine's address is this replica's alone.

        It is on the loopback interface if the engine's is, so that no other machine reaches more
        than before.
        """
        urls = [Address.of(url, None).url for url in self._options.tokasaurus_url]
        is_plain = self._url.startswith("http://") and "/" not in self._url[len("http://") :]
        if is_plain and urls.count(self._url) == 1 and self.replica_rank < len(urls):
            others = self.replica_rank + len(urls)  # the first replica that would share it
            if self._num_replicas is not None and others >= self._num_replicas:
                return None
        if is_loopback(self._url) or not self._url.startswith("http://"):
            return "127.0.0.1"
        return str(ray.util.get_node_ip_address()).strip("[]")

    @property
    def _num_replicas(self) -> int | None:
        """How many replicas veRL starts, if it can be known."""
        if self.rollout_mode is RolloutMode.STANDALONE and self.config.nnodes > 0:
            return int(self.config.nnodes * self.config.n_gpus_per_node // self.world_size)
        if self._num_trainers is not None:
            return int(self._num_trainers // self.world_size)
        return None

    def _tell(self) -> None:
        options, count = self._options, self._num_replicas
        log.info("replica %d uses the engine at %s", self.replica_rank, self._url)
        if self.replica_rank == 0 and count is not None and len(options.tokasaurus_url) > count:
            log.warning(
                "custom.tokasaurus_url names %d engines and veRL starts %d replicas, so some"
                " engines get no requests; there are nnodes * n_gpus_per_node /"
                " tensor_model_parallel_size replicas",
                len(options.tokasaurus_url),
                count,
            )


def server_name(replica_rank: int, kind: str = "", suffix: str = "") -> str:
    """The name of a replica's server actor."""
    return f"tokasaurus_server_{kind}{replica_rank}{suffix}"
