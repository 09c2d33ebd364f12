"""``launcher=ray``: the processes of an engine on the nodes of a Ray cluster.

Ray finds room and starts an outpost in each bundle, as an actor. The rest is done by outposts. The
actors end with the program that has started them, or with their node; then the link ends, and the
processes too.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tokasaurus.config.engine import EngineConfig
from tokasaurus.errors import ConfigError, LaunchError
from tokasaurus.integrations.ray.bundles import Bundles, plan_bundles
from tokasaurus.launch.remote.launcher import RemoteLauncher
from tokasaurus.launch.remote.link import secret_of
from tokasaurus.launch.remote.outpost import Outpost
from tokasaurus.launch.remote.outposts import Outposts
from tokasaurus.observability.logging import configure_logging

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

__all__ = ["connect", "launch_on_ray", "reserve"]

log = logging.getLogger(__name__)

_REPORT_EVERY_S = 30.0
_REACH_S = 10.0


class _OutpostActor:
    """An outpost as an actor of Ray."""

    def run(
        self,
        address: tuple[str, int],
        secret: str,
        index: int,
        patience_s: float,
        log_settings: tuple[str, str],
    ) -> None:
        """Returns when the engine has ended; raises LaunchError if the supervisor is gone."""
        configure_logging(f"outpost-{index}", *log_settings)
        Outpost(address, secret, index).run(patience_s)


def connect(config: EngineConfig) -> Any:
    """Connects this program to the cluster at ``ray_address``; returns the module ``ray``.

    Raises:
        ConfigError: Ray is not installed.
        LaunchError: there is no cluster at the address.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise ConfigError(
            "launcher=ray needs Ray; install it with pip install 'tokasaurus[ray]'"
        ) from None
    address = config.ray_address
    if address.startswith("ray://"):
        raise ConfigError(
            f"ray_address={address}: run the command on a node of the cluster, with"
            " ray_address=auto; processes on its nodes must reach this one"
        )
    try:
        _reach(address)
        ray.init(
            address=address,
            namespace="tokasaurus",
            logging_level=logging.WARNING,
            configure_logging=False,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise LaunchError(
            f"ray_address={address}: no Ray cluster answers ({str(error).splitlines()[0]}); start"
            " one with ray start --head, or set ray_address=HOST:PORT"
        ) from None
    return ray


def _reach(address: str) -> None:
    """Raises OSError if nothing answers at an address. Ray itself would try for minutes."""
    host, separator, port = address.rpartition(":")
    if separator and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _REACH_S).close()


def launch_on_ray(config: EngineConfig) -> RemoteLauncher:
    """Finds room on the cluster, and starts an outpost in each bundle.

    Raises:
        ConfigError: Ray is not installed.
        LaunchError: there is no cluster, or no room in time, or an outpost does not start.
    """
    ray = connect(config)
    deadline = time.monotonic() + config.launch_timeout_s
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    bundles = plan_bundles(config, nodes)
    try:
        group = reserve(ray, bundles, deadline)
    except BaseException:
        ray.shutdown()
        raise
    try:
        return _start_outposts(ray, group, bundles, config, deadline)
    except BaseException:
        _give_back(ray, group)
        raise


def reserve(ray: Any, bundles: Bundles, deadline: float) -> PlacementGroup:
    """Waits for room on the cluster, and takes it.

    Args:
        ray: the module.
        bundles: what is needed.
        deadline: when to give up, of the monotonic clock.

    Raises:
        LaunchError: there is no room in time.
    """
    group = ray.util.placement_group(
        [{bundles.resource: bundles.amount}] * bundles.count, strategy="SPREAD"
    )
    try:
        _await_room(ray, group, bundles, deadline)
    except BaseException:
        ray.util.remove_placement_group(group)
        raise
    return group


def _await_room(ray: Any, group: PlacementGroup, bundles: Bundles, deadline: float) -> None:
    while True:
        left = deadline - time.monotonic()
        if group.wait(max(0.0, min(left, _REPORT_EVERY_S))):
            return
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        free = ray.available_resources().get(bundles.resource, 0)
        state = (
            f"{bundles} are needed, each on one node; the cluster has room for"
            f" {bundles.room_in(nodes)} when it is empty, and {free:g} {bundles.resource} are free"
        )
        if left <= 0:
            raise LaunchError(f"{state}; lower dp_size, pp_size or tp_size, or add nodes")
        log.warning("waiting for room on the Ray cluster: %s", state)


class _Actors:
    """Starts outposts as actors, each in the bundle of its number."""

    def __init__(
        self,
        ray: Any,
        group: PlacementGroup,
        bundles: Bundles,
        config: EngineConfig,
        address: tuple[str, int],
        secret: str,
    ) -> None:
        self._ray, self._group = ray, group
        self._amount = {"num_cpus": 0, f"num_{bundles.resource.lower()}s": bundles.amount}
        self._arguments = (config.launch_timeout_s, (config.log_level, config.log_format))
        self._address, self._secret = address, secret
        self._class = ray.remote(_OutpostActor)
        self._runs: dict[int, Any] = {}

    def start(self, index: int) -> None:
        """Starts an actor, once its bundle has a node."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self._group, placement_group_bundle_index=index
        )
        actor = self._class.options(scheduling_strategy=strategy, **self._amount).remote()
        self._runs[index] = actor.run.remote(self._address, self._secret, index, *self._arguments)

    def check(self, indices: Sequence[int]) -> None:
        """Raises LaunchError if one of these outposts has failed.

        An actor that was lost is started again: a node may be gone before the cluster notices.
        """
        for index in indices:
            run = self._runs[index]
            if not self._ray.wait([run], timeout=0)[0]:
                continue
            errors = self._ray.exceptions
            try:
                self._ray.get(run)
            except errors.RayActorError as error:
                if error.actor_init_failed:
                    raise self._does_not_start(error) from None
                log.warning("outpost %d was lost before it joined, and is started again", index)
                self.start(index)
            except errors.RayError as error:
                raise self._does_not_start(error) from None

    def _does_not_start(self, error: Exception) -> LaunchError:
        reason = str(error).strip().splitlines()[-1]
        return LaunchError(f"an outpost on the Ray cluster does not start: {reason}")


def _start_outposts(
    ray: Any, group: PlacementGroup, bundles: Bundles, config: EngineConfig, deadline: float
) -> RemoteLauncher:
    secret = secret_of(os.environ)
    outposts = Outposts(ray.util.get_node_ip_address(), secret)
    actors = _Actors(ray, group, bundles, config, outposts.address, secret)
    give_back = partial(_give_back, ray, group)
    launcher = RemoteLauncher(outposts, bundles.places, actors, on_close=give_back)
    try:
        for index in range(bundles.count):
            actors.start(index)
        launcher.await_outposts(max(0.0, deadline - time.monotonic()))
    except BaseException:
        outposts.close()
        raise
    return launcher


def _give_back(ray: Any, group: PlacementGroup) -> None:
    ray.util.remove_placement_group(group)
    ray.shutdown()
