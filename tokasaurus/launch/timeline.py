"""A Chrome trace of an engine's first batches, for chrome://tracing and https://ui.perfetto.dev.

::

    manager   │turn│      │turn│        │turn│
    queue          └ 0 ┐       └── 1 ──┐          from the end of the turn to the worker's start
    device             │ batch 0 │     │ batch 1 │

Each process appends its own events to one file. A trace is a list in JSON whose closing bracket may
be missing, so no process has to be the last. All processes of a machine share one monotonic clock.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tokasaurus.protocol.messages import ForwardBatch

__all__ = ["Timeline", "begin_file"]

R = TypeVar("R")

_LANES = {"manager": 1, "queue": 2, "device": 3}
_BUFFERED = 64  # events


def begin_file(path: Path) -> None:
    """Begins a trace anew, with the names of its lanes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": lane, "args": {"name": name}}
        for name, lane in _LANES.items()
    ]
    path.write_text("[\n" + "".join(json.dumps(each) + ",\n" for each in names))


class Timeline:
    """The events of one process.

    Args:
        path: of the file, which ``begin_file`` began.
        num_batches: later ones are not recorded.
    """

    def __init__(self, path: Path, num_batches: int) -> None:
        self._path = path
        self._num_batches = num_batches
        self._events: list[dict[str, Any]] = []

    def turn(self, started: float, num_events: int, orders: list[Any]) -> None:
        """A turn of the manager ends now, and these orders go to the worker."""
        batches = [each for each in orders if isinstance(each, ForwardBatch)]
        if not batches or batches[0].number >= self._num_batches:
            return
        now = time.monotonic()
        names = [each.number for each in batches]
        self._add("X", "turn", "manager", started, now, events=num_events, batches=names)
        for batch in batches:
            self._add("b", f"batch {batch.number}", "queue", now, number=batch.number)
        self._finish(batches[-1].number)

    def submitting(self, submit: Callable[[Any], R]) -> Callable[[Any], R]:
        """``submit`` of the worker, recorded: on the CPU a batch runs there."""

        def recorded(message: Any) -> R:
            if not isinstance(message, ForwardBatch) or message.number >= self._num_batches:
                return submit(message)
            started = time.monotonic()
            result = submit(message)
            name = f"batch {message.number}"
            self._add("e", name, "queue", started, number=message.number)
            rows = {"decodes": len(message.decode_slots), "prompts": len(message.prefill_slots)}
            self._add("X", name, "device", started, time.monotonic(), **rows)
            self._finish(message.number)
            return result

        return recorded

    def _add(
        self,
        phase: str,
        name: str,
        lane: str,
        at: float,
        end: float | None = None,
        number: int | None = None,
        **arguments: Any,
    ) -> None:
        event: dict[str, Any] = {"ph": phase, "name": name, "cat": lane, "pid": 1}
        event |= {"tid": _LANES[lane], "ts": round(at * 1e6, 1), "args": arguments}
        if end is not None:
            event["dur"] = round((end - at) * 1e6, 1)
        if number is not None:
            event["id"] = number
        self._events.append(event)

    def _finish(self, number: int) -> None:
        """Writes what there is, now and then and after the last batch."""
        if len(self._events) < _BUFFERED and number + 1 < self._num_batches:
            return
        with self._path.open("a") as file:
            file.write("".join(json.dumps(each) + ",\n" for each in self._events))
        self._events.clear()
