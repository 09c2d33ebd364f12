"""``toka``: reads the command line, takes the port, and keeps an engine on it.

A first word that names one of ``tokasaurus.commands`` runs that command instead.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from tokasaurus.commands import COMMANDS
from tokasaurus.config.commands import run_command
from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.parser import drop_warning, log_format_of, parse_command_line
from tokasaurus.config.pipes import ends_with_its_reader
from tokasaurus.errors import ConfigError, ModelError
from tokasaurus.launch.keeping.keeper import Keeper
from tokasaurus.launch.listening import listen
from tokasaurus.observability.logging import configure_logging, report_refusal

__all__ = ["main", "run"]


def run(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs engines on one port to their end: one, or one after another if it is restarted.

    Args:
        arguments: the command line.
        environment: variables that add to it.

    Returns:
        The exit status: 0 after a drain, 1 if a process died, 2 if the configuration is wrong.
    """
    answers = {"--show-memory": _show_memory}
    try:
        config = parse_command_line(
            arguments, environment, _explain, COMMANDS, answers, drop_warning
        )
        listener = listen(config.host, config.port)
    except (ConfigError, ModelError) as error:
        report_refusal(str(error), log_format_of(arguments, environment))
        return 2
    configure_logging("toka", config.log_level, config.log_format)
    return Keeper(arguments, config.host, listener).run()


def _explain(config: EngineConfig) -> list[str]:
    """The lines of ``--show``, which need code that is slow to import."""
    from tokasaurus.launch.assemble import explain

    return explain(config)


def _show_memory(config: EngineConfig) -> str:
    """The table of ``--show-memory``; likewise."""
    from tokasaurus.launch.assemble import show_memory

    return show_memory(config)


@ends_with_its_reader
def main() -> None:
    """Runs the command that the first word names, or an engine."""
    words = sys.argv[1:]
    if words and words[0] in COMMANDS:
        sys.exit(run_command("toka", "its commands.", "tokasaurus.commands", COMMANDS, words))
    sys.exit(run(words, os.environ))


if __name__ == "__main__":
    main()
