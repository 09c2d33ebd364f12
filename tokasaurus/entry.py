"""``toka``: parses the command line, takes the port, and hands the engine to its supervisor."""

from __future__ import annotations

import dataclasses
import errno
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.parser import parse_command_line
from tokasaurus.config.slices import EngineSlices
from tokasaurus.errors import ConfigError, LaunchError, ModelError
from tokasaurus.launch.assemble import assemble, explain
from tokasaurus.launch.exposure import check_certificate, open_door_warning, with_keys
from tokasaurus.launch.remote.launcher import RemoteLauncher
from tokasaurus.launch.supervisor import Supervisor

__all__ = ["main", "run"]

_BACKLOG = 2048  # connections that wait while the server is busy


MakeLauncher: TypeAlias = Callable[[EngineConfig], "RemoteLauncher | None"]


def run(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    make_launcher: MakeLauncher | None = None,
) -> int:
    """Runs one engine to its end.

    Args:
        arguments: the command line.
        environment: variables that add to it.
        make_launcher: finds places for the processes; None for what the flags say.

    Returns:
        The exit status: 0 after a drain, 1 if a process died, 2 if the configuration is wrong.
    """
    try:
        config = with_keys(parse_command_line(arguments, environment, explain), environment)
        check_certificate(config)
        listener = listen(config.host, config.port)
        address, port = listener.getsockname()[:2]
        config = dataclasses.replace(config, port=port)  # port=0 takes a free one
        launcher = (make_launcher or _launcher_of)(config)
        _check_foreground(config, launcher)
        slices = _assemble(config, launcher)
    except (ConfigError, LaunchError, ModelError) as error:
        print(f"toka: error: {error}", file=sys.stderr)
        return 2
    warning = open_door_warning(config, address)
    if warning is not None:
        print(f"toka: warning: {warning}", file=sys.stderr)
    try:
        return Supervisor(slices, listener, launcher=launcher).run()
    except LaunchError as error:
        print(f"toka: error: {error}", file=sys.stderr)
        return 1


def _launcher_of(config: EngineConfig) -> RemoteLauncher | None:
    if config.launcher == "local":
        return None
    from tokasaurus.integrations.ray.launcher import launch_on_ray

    return launch_on_ray(config)


def _check_foreground(config: EngineConfig, launcher: RemoteLauncher | None) -> None:
    if launcher is not None and config.local_proc_name != "server":
        launcher.close()
        raise ConfigError(
            f"local_proc_name={config.local_proc_name}: managers and workers run on other machines,"
            " and here only the server; leave it out"
        )


def _assemble(config: EngineConfig, launcher: RemoteLauncher | None) -> EngineSlices:
    if launcher is None:
        return assemble(config)
    try:
        return assemble(config, launcher.devices(config))
    except BaseException:
        launcher.close()
        raise


def listen(host: str, port: int) -> socket.socket:
    """Takes the port before anything slow begins.

    Raises:
        ConfigError: the address is not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} is in use on {host}; choose another with port="
            ) from None
        # socket.create_server adds the address to strerror.
        reason = (error.strerror or str(error)).partition(" (while")[0]
        raise ConfigError(f"cannot listen on host={host} port={port}: {reason}") from None


def main() -> None:
    sys.exit(run(sys.argv[1:], os.environ))


if __name__ == "__main__":
    main()
