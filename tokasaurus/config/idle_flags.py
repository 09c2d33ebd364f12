"""Flags that the user has set, and that change nothing on this device.

They are no errors: the same configuration may serve on a laptop and on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.schema import flags_of

__all__ = ["idle_flags"]

_OF_GRAPHS = ("cudagraph_max_size", "cudagraph_step", "cudagraph_max_kv_indices_per_seq")
_OF_GROUPS = ("hydragen_min_group_size", "hydragen_min_prefix_len")


def idle_flags(config: EngineConfig, device: str) -> tuple[str, ...]:
    """A line for each reason why flags change nothing.

    Args:
        config: the user's choices.
        device: "cpu" or "cuda".
    """
    lines = []
    graphs = _changed(config, _OF_GRAPHS)
    if config.use_cudagraphs is False:
        lines += _line(graphs, "use_cudagraphs=F")
    elif device != "cuda":
        turned_on = ["use_cudagraphs"] if config.use_cudagraphs else []
        lines += _line([*turned_on, *graphs], f"device={device} has no CUDA graphs")
    if config.use_hydragen is False:
        lines += _line(_changed(config, _OF_GROUPS), "use_hydragen=F")
    return tuple(lines)


def _changed(config: EngineConfig, names: Iterable[str]) -> list[str]:
    flags = flags_of(EngineConfig)
    return [name for name in names if getattr(config, name) != flags[name].default]


def _line(names: list[str], reason: str) -> list[str]:
    if not names:
        return []
    *others, last = names
    listed = f"{', '.join(others)} and {last} change" if others else f"{last} changes"
    return [f"{listed} nothing: {reason}"]
