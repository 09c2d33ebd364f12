"""What the keeper, its engines, and ``toka restart`` say to one another."""

from __future__ import annotations

import socket
from typing import TypeAlias

import msgspec

from tokasaurus.launch.note_socket import NoteSocket

__all__ = [
    "LANGUAGE",
    "AskRestart",
    "AskStanding",
    "Begin",
    "CannotServe",
    "Control",
    "Describe",
    "Description",
    "End",
    "EngineLink",
    "Engineward",
    "Keeperward",
    "Outcome",
    "Progress",
    "Serves",
    "Standing",
    "StepDown",
    "Watches",
]

LANGUAGE = 1
"""Raised with every change of the notes between keeper and engine. The two may have different
versions, since the keeper stays when the package below it is upgraded."""


class _Note(msgspec.Struct, frozen=True, tag=True):
    pass


class Standing(_Note, frozen=True):
    """Engine to keeper: what a new engine must know, and whether it can take over."""

    refusal: str | None  # why not
    has_new_weights: bool  # the weights have been updated since the start
    host: str
    data_dir: str
    num_kv_tokens: int  # of a replica's KV cache
    max_tokens_per_forward: int
    # Memory of the host that the engine has planned with, and may still take.
    untaken_bytes: int
    untaken_plan: str = ""  # the arithmetic behind ``untaken_bytes``


class Begin(_Note, frozen=True):
    """Keeper to an engine: the first note."""

    language: int
    number: int  # of the engine, from 1
    words: tuple[str, ...]  # of the command line of ``toka``
    added_words: tuple[str, ...]  # by restarts; they win
    listener_fd: int
    directory: str  # of the keeper, for the sockets of engines
    predecessor: Standing | None = None  # the engine beside which this one starts


class AskStanding(_Note, frozen=True):
    """Keeper to the engine that serves: a restart is wanted."""


class StepDown(_Note, frozen=True):
    """Keeper to the engine that serves: engine number ``successor`` serves now; finish and end."""

    successor: int
    timeout_s: float


class End(_Note, frozen=True):
    """Keeper to an engine: drain; the second one ends it at once."""


class Serves(_Note, frozen=True):
    """Engine to keeper: it answers clients from now on."""


class Watches(_Note, frozen=True):
    """Engine to keeper: it reads notes from now on, and ends in good order when told to."""

    timeout_s: float  # restart_timeout_s


class CannotServe(_Note, frozen=True):
    """Engine to keeper: it is about to exit, and why."""

    reason: str


class Describe(_Note, frozen=True):
    """``toka restart`` to keeper: which engine is this?"""


class Description(_Note, frozen=True):
    """Keeper to ``toka restart``."""

    host: str
    port: int
    process_id: int


class AskRestart(_Note, frozen=True):
    """``toka restart`` to keeper."""

    words: tuple[str, ...]  # more words of the command line


class Progress(_Note, frozen=True):
    """Keeper to ``toka restart``: how far the restart is."""

    text: str


class Outcome(_Note, frozen=True):
    """Keeper to ``toka restart``: the last note."""

    is_done: bool  # the new engine serves, and the old one has ended
    text: str


Engineward: TypeAlias = Begin | AskStanding | StepDown | End
Keeperward: TypeAlias = Standing | Watches | Serves | CannotServe
Control: TypeAlias = Describe | Description | AskRestart | Progress | Outcome

_of_engines = msgspec.json.Decoder(Engineward | Keeperward)


class EngineLink(NoteSocket[Engineward | Keeperward]):
    """One end of the connection between keeper and engine."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock, _of_engines)
