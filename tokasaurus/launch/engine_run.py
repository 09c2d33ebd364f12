"""One engine from its command line to its end."""

from __future__ import annotations

import dataclasses
import logging
import socket
from collections.abc import Mapping, Sequence

from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.parser import log_format_of, parse_command_line
from tokasaurus.config.slices import EngineSlices
from tokasaurus.errors import ConfigError, LaunchError, ModelError
from tokasaurus.launch.assemble import explain
from tokasaurus.launch.exposure import check_certificate, open_door_warning, with_keys
from tokasaurus.launch.keeping.engine_end import KeeperEnd
from tokasaurus.launch.keeping.notes import Begin, CannotServe
from tokasaurus.launch.keeping.succession import check_successor, placed_beside, words_of
from tokasaurus.launch.launching import MakeLauncher, placed
from tokasaurus.launch.listening import listen
from tokasaurus.launch.processes import Launcher
from tokasaurus.launch.supervisor import Supervisor
from tokasaurus.observability.logging import configure_logging, report_refusal

__all__ = ["run_alone", "run_below"]

log = logging.getLogger(__name__)


def run_alone(
    arguments: Sequence[str], environment: Mapping[str, str], make_launcher: MakeLauncher
) -> int:
    """Runs an engine in this process, without a keeper. So it cannot be restarted.

    Args:
        arguments: the command line.
        environment: variables that add to it.
        make_launcher: finds places for the processes on other machines.

    Returns:
        The exit status: 0 after a drain, 1 if a process died, 2 if the configuration is wrong.
    """
    try:
        config = _read(arguments, environment)
        listener = listen(config.host, config.port)
        config = _on_port_of(listener, config)
        slices, launcher = placed(config, make_launcher)
    except (ConfigError, LaunchError, ModelError) as error:
        report_refusal(str(error), log_format_of(arguments, environment))
        return 2
    return _run(config, slices, listener, launcher)


def run_below(begin: Begin, environment: Mapping[str, str], keeper: KeeperEnd) -> int:
    """Runs an engine that a keeper has started.

    Args:
        begin: what the keeper wants.
        environment: variables that add to the command line.
        keeper: this end of the connection to it.

    Returns:
        The exit status, as above.
    """
    listener = socket.socket(fileno=begin.listener_fd)
    words, environment = words_of(begin, environment)
    try:
        config = _read(words, environment)
        if begin.predecessor is None:
            config = _on_port_of(listener, config)
            slices, launcher = placed(config)
        else:
            check_successor(config, begin.predecessor, listener.getsockname()[1])
            config = _on_port_of(listener, config)
            slices, launcher = placed_beside(config, begin.predecessor)
    except (ConfigError, LaunchError, ModelError) as error:
        keeper.send(CannotServe(str(error)))
        if begin.predecessor is None:  # otherwise the keeper logs it
            report_refusal(str(error), log_format_of(words, environment))
        return 2
    return _run(config, slices, listener, launcher, keeper)


def _read(words: Sequence[str], environment: Mapping[str, str]) -> EngineConfig:
    """Reads a command line, begins the log, and logs what there is to warn of.

    Raises:
        ConfigError: a flag, a file of keys or a certificate is wrong.
    """
    warnings: list[str] = []
    config = parse_command_line(words, environment, explain, warn=warnings.append)
    configure_logging("toka", config.log_level, config.log_format)
    for line in warnings:
        log.warning("%s", line)
    config = with_keys(config, environment)
    check_certificate(config)
    return config


def _on_port_of(listener: socket.socket, config: EngineConfig) -> EngineConfig:
    """The configuration with the port that was taken: port=0 takes a free one."""
    return dataclasses.replace(config, port=listener.getsockname()[1])


def _run(
    config: EngineConfig,
    slices: EngineSlices,
    listener: socket.socket,
    launcher: Launcher,
    keeper: KeeperEnd | None = None,
) -> int:
    warning = open_door_warning(config, listener.getsockname()[0])
    if warning is not None:
        log.warning("%s", warning)
    try:
        return Supervisor(slices, listener, launcher=launcher, keeper=keeper).run()
    except LaunchError as error:
        if keeper is not None:
            keeper.send(CannotServe(str(error)))
        if keeper is None or not keeper.succession.follows:
            report_refusal(str(error), config.log_format)
        return 1
