"""From a user's choices to slices and a launcher: where processes run, and with which devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.slices import EngineSlices
from tokasaurus.errors import ConfigError
from tokasaurus.launch.assemble import assemble
from tokasaurus.launch.processes import Launcher, LocalLauncher
from tokasaurus.launch.remote.launcher import RemoteLauncher

__all__ = ["MakeLauncher", "placed"]

MakeLauncher: TypeAlias = Callable[[EngineConfig], RemoteLauncher]


def placed(
    config: EngineConfig, make_launcher: MakeLauncher | None = None
) -> tuple[EngineSlices, Launcher]:
    """Finds places for the processes of an engine, and resolves its configuration for them.

    Args:
        config: the user's choices.
        make_launcher: finds places on other machines; None does what ``launcher`` says.

    Returns:
        The slices, and a launcher, which the caller closes.

    Raises:
        ConfigError: flags contradict one another, the model or a machine.
        LaunchError: other machines are not there.
        ModelError: the model cannot be found, or its architecture is unknown.
    """
    if make_launcher is None:
        if config.launcher == "local":
            return assemble(config), LocalLauncher()
        from tokasaurus.integrations.ray.launcher import launch_on_ray

        make_launcher = launch_on_ray
    if config.local_proc_name != "server":
        raise ConfigError(
            f"local_proc_name={config.local_proc_name}: managers and workers run on other machines,"
            " and here only the server; leave it out"
        )
    launcher = make_launcher(config)
    try:
        return assemble(config, launcher.devices(config)), launcher
    except BaseException:
        launcher.close()
        raise
