"""``toka``: parses the command line, takes the port, and hands the engine to its supervisor.

A first word that names one of ``tokasaurus.commands`` runs that command instead.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import socket
import sys
from collections.abc import Mapping, Sequence

from tokasaurus.commands import COMMANDS
from tokasaurus.config.commands import run_command
from tokasaurus.config.parser import parse_command_line
from tokasaurus.errors import ConfigError, LaunchError, ModelError
from tokasaurus.launch.assemble import explain, show_memory
from tokasaurus.launch.exposure import check_certificate, open_door_warning, with_keys
from tokasaurus.launch.launching import MakeLauncher, placed
from tokasaurus.launch.supervisor import Supervisor

__all__ = ["main", "run"]

_ANSWERS = {"--show-memory": show_memory}

_BACKLOG = 2048  # connections that wait while the server is busy


def run(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    make_launcher: MakeLauncher | None = None,
) -> int:
    """Runs one engine to its end.

    Args:
        arguments: the command line.
        environment: variables that add to it.
        make_launcher: finds places for the processes on other machines; None does what flags say.

    Returns:
        The exit status: 0 after a drain, 1 if a process died, 2 if the configuration is wrong.
    """
    try:
        parsed = parse_command_line(arguments, environment, explain, COMMANDS, _ANSWERS)
        config = with_keys(parsed, environment)
        check_certificate(config)
        listener = listen(config.host, config.port)
        address, port = listener.getsockname()[:2]
        config = dataclasses.replace(config, port=port)  # port=0 takes a free one
        slices, launcher = placed(config, make_launcher)
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
    """Runs the command that the first word names, or an engine."""
    words = sys.argv[1:]
    if words and words[0] in COMMANDS:
        sys.exit(run_command("toka", "its commands.", "tokasaurus.commands", COMMANDS, words))
    sys.exit(run(words, os.environ))


if __name__ == "__main__":
    main()
