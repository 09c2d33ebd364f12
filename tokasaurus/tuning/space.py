"""Where a search of ``toka tune`` begins, and what it may change on a machine."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tokasaurus.errors import ConfigError
from tokasaurus.planner.candidates import Layout, Question, candidate
from tokasaurus.planner.search import Outcome, Plan
from tokasaurus.tuning.coordinates import Coordinate, Point
from tokasaurus.tuning.machine import Here

__all__ = ["coordinates_of", "layouts_here", "planned", "start_of"]

_SEQS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_TOKENS = (256, 512, 1024, 2048, 4096, 8192, 16384)
_PAGES = (16, 32, 64)


def planned(question: Question) -> Question:
    """What the planner is asked. To it a processor is one device, whatever shares its cores."""
    return dataclasses.replace(question, sizes={}) if question.device.kind == "cpu" else question


def layouts_here(question: Question, plan: Plan, here: Here) -> list[Layout]:
    """The layouts to try: those of the plan; without GPUs, replicas and ranks that share cores."""
    if here.device.kind == "cuda":
        return list(dict.fromkeys(each.candidate.layout for each in plan.outcomes))
    counts = [1 << shift for shift in range(here.num_cores.bit_length())]
    tried = [Layout(count, 1, 1) for count in counts]
    tried += [Layout(1, count, 1) for count in counts[1:]]
    found = []
    for layout in tried:
        if all(getattr(layout, name) == size for name, size in question.sizes.items()):
            with contextlib.suppress(ConfigError):
                candidate(question, layout)
                found.append(layout)
    return found


def start_of(best: Outcome, here: Here, decided: Mapping[str, Any]) -> dict[str, Any]:
    """The point of the planner's best configuration."""
    manager = best.candidate.manager
    sizes = dataclasses.asdict(best.candidate.layout)
    point = {
        **sizes,
        "max_seqs_per_forward": manager.max_seqs_per_forward,
        "max_tokens_per_forward": manager.max_tokens_per_forward,
        "page_size": manager.page_size,
    }
    if here.device.kind == "cpu":
        layout = Layout(**{name: decided.get(name, size) for name, size in sizes.items()})
        point["cpu_threads"] = _num_threads(layout, here)
    return {name: value for name, value in point.items() if name not in decided}


def coordinates_of(start: Point, layouts: Sequence[Layout], here: Here) -> list[Coordinate]:
    """What the search may change: flags of the first point that matter on this device.

    Args:
        start: the first point, whose values are among the options.
        layouts: that hold the model.
        here: the machine.
    """
    coordinates = []
    for name, values in (
        ("max_seqs_per_forward", _SEQS),
        ("max_tokens_per_forward", _TOKENS),
        ("page_size", _PAGES),
    ):
        if name in start:
            options = sorted({*values, start[name]})
            coordinates.append(Coordinate([{name: value} for value in options]))
    sizes = [
        {name: size for name, size in dataclasses.asdict(layout).items() if name in start}
        for layout in layouts
    ]
    if here.device.kind == "cpu":
        halves = [here.num_cores >> shift for shift in range(here.num_cores.bit_length())]
        coordinates.append(Coordinate([{"cpu_threads": each} for each in sorted(halves)]))
        sizes = [
            {**size, "cpu_threads": _num_threads(layout, here)}
            for size, layout in zip(sizes, layouts, strict=True)
        ]
    if len(sizes) > 1:
        coordinates.append(Coordinate(sizes, ordered=False))
    return coordinates


def _num_threads(layout: Layout, here: Here) -> int:
    """Of each worker: they share the cores."""
    return max(here.num_cores // layout.num_devices, 1)
