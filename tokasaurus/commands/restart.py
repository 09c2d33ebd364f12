"""``toka restart``: lets a new engine take over from a running one, without losing a request.

    toka restart
    toka restart port=8080 model=/models/new max_seqs_per_forward=512

It finds the running ``toka`` through this user's temporary directory, and says how far the restart
is. Flags of ``toka`` are added to those that the running engine has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokasaurus.config.schema import Schema, flag
from tokasaurus.errors import ConfigError, LaunchError
from tokasaurus.launch.keeping.control import ControlLink, connect_to_keepers
from tokasaurus.launch.keeping.notes import AskRestart, Control, Description, Outcome, Progress
from tokasaurus.launch.note_socket import NotUnderstood

__all__ = ["PASSES_ON", "SCHEMA", "RestartConfig", "run"]

PASSES_ON = True


@dataclass(frozen=True, kw_only=True)
class RestartConfig:
    """Which engine to restart."""

    port: int | None = flag(
        None, minimum=1, maximum=65535, help="The port of the engine, if several run here."
    )


SCHEMA = Schema(
    RestartConfig,
    program="toka restart",
    summary="lets a new engine take over from a running one, without losing a request."
    " Flags of toka are added to those of the running engine, and win.",
)


def run(config: RestartConfig, words: Sequence[str]) -> None:
    """Restarts an engine, and returns when the new one serves and the old one has ended.

    Args:
        config: which engine.
        words: flags of ``toka`` for the new engine.

    Raises:
        ConfigError: there is no such engine, or several.
        LaunchError: the restart was refused or has failed; the old engine goes on.
    """
    link, engine = _find(config.port)
    print(f"restarting the engine at {engine.host}:{engine.port} (toka is {engine.process_id})")
    link.send(AskRestart(tuple(words)))
    while (notes := _received(link)) is not None:
        for note in notes:
            if isinstance(note, Progress):
                print(note.text, flush=True)
            elif isinstance(note, Outcome):
                if not note.is_done:
                    raise LaunchError(note.text)
                print(note.text)
                return
    raise LaunchError("toka has ended")


def _received(link: ControlLink) -> list[Control] | None:
    try:
        return link.receive()
    except NotUnderstood:
        raise LaunchError(
            "toka runs another version, and how the restart goes on is in its log"
        ) from None


def _find(port: int | None) -> tuple[ControlLink, Description]:
    found = list(connect_to_keepers())
    fitting = [(link, engine) for link, engine in found if port in (None, engine.port)]
    if len(fitting) == 1:
        return fitting[0]
    ports = ", ".join(str(engine.port) for _, engine in found)
    if fitting:
        raise ConfigError(f"several engines run here, at the ports {ports}: say which, with port=")
    there = f"; there are some at {ports}" if found else ""
    raise ConfigError(
        f"no engine that this user has started runs {'here' if port is None else f'at port {port}'}"
        f"{there}. It must have the same temporary directory (TMPDIR); SIGUSR2 to toka restarts it"
        " as well"
    )
