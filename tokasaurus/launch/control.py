"""Control of an embedded engine: what the calls of ``LLM`` and ``AsyncLLM`` mean as commands.

The words are those of vLLM and of the HTTP API.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath
from typing import TypeAlias

from tokasaurus.errors import RequestError
from tokasaurus.protocol.commands import (
    Action,
    Pause,
    ReleaseMemory,
    RestoreMemory,
    Resume,
)
from tokasaurus.server.control.weight_files import weight_files
from tokasaurus.text.commands import MEMORY_KINDS, PAUSE_MODES, Commands
from tokasaurus.text.params import renamed

__all__ = ["Weights", "pause_action", "sleep_actions", "wake_up_actions", "weights_of"]

Weights: TypeAlias = str | PathLike[str] | Sequence[str | PathLike[str]]
"""A directory with safetensors files, one such file, or a list of them."""

_LEVELS = (0, 1, 2)


def pause_action(mode: str) -> Pause:
    """A pause. Raises RequestError if there is no such mode."""
    if mode not in PAUSE_MODES:
        raise RequestError(f"mode must be one of {', '.join(PAUSE_MODES)}, not {mode!r}", "mode")
    return Pause(PAUSE_MODES[mode])


def sleep_actions(level: int, mode: str) -> list[Action]:
    """The commands of a sleep, in order. Raises RequestError if a level or mode is wrong."""
    if level not in _LEVELS:
        raise RequestError(f"level must be 0, 1 or 2, not {level!r}", "level")
    release = [ReleaseMemory(weights=True, kv_cache=True)] if level else []
    return [pause_action(mode), *release]


def wake_up_actions(commands: Commands, tags: Sequence[str] | None) -> list[Action]:
    """The commands that restore memory, in order; the last resumes once everything is restored.

    Args:
        commands: what the engine has released, and whether a sleep has paused it.
        tags: "weights", "kv_cache" or both; None is both.

    Raises:
        RequestError: there is no such tag.
    """
    if isinstance(tags, str) or not set(tags or ()) <= {*MEMORY_KINDS}:
        raise RequestError(f"tags must be a list of weights and kv_cache, not {tags!r}", "tags")
    kinds = commands.released.intersection(MEMORY_KINDS if tags is None else tags)
    actions: list[Action] = []
    if kinds:
        actions.append(RestoreMemory("weights" in kinds, "kv_cache" in kinds))
    if commands.wake_resumes and not commands.released - kinds:
        actions.append(Resume())
    return actions


def weights_of(path: Weights) -> list[str]:
    """The safetensors files of new weights. Raises RequestError if there are none."""
    paths = [path] if isinstance(path, str | PathLike) else list(path)
    if not paths:
        raise RequestError("path is an empty list; name at least one safetensors file", "path")
    try:
        return [file for each in paths for file in weight_files(fspath(each))]
    except RequestError as error:
        raise renamed(error, {"model_path": "path"}) from None
