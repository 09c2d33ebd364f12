"""What the page shows, as JSON: one snapshot of the engine, bounded in size.

A snapshot costs a millisecond or two whatever the engine does: of requests and batches it has the
first, and of the rest their number.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any

import msgspec

from tokasaurus.batch.records import Batch
from tokasaurus.batch.runner import BatchRunner
from tokasaurus.errors import EngineError
from tokasaurus.protocol.watching import Outlook
from tokasaurus.server.history import Sample
from tokasaurus.server.state import EngineState
from tokasaurus.text.generation import Generation
from tokasaurus.text.generations import Generations

__all__ = ["Overview"]

_MAX_REQUESTS = 100
_MAX_BATCHES = 20
_MAX_REPLICAS = 4  # whose forecast is shown
_WATCH_S = 3.0  # managers send forecasts for this time after each snapshot
_MAX_PAST = 20  # forecasts that are kept, to see what became of them
_PAST_EVERY = 5  # snapshots
_MAX_USED = 600
_DIGITS = 8  # of a key's digest


class Overview:
    """Makes snapshots of one engine.

    Args:
        state: of the engine.
        batches: runs batches; None where there are none.
        clock: that of the metrics, in seconds.
    """

    def __init__(
        self,
        state: EngineState,
        batches: BatchRunner | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state = state
        self._batches = batches
        self._clock = clock
        self._num_snapshots = 0
        # By replica: steps with the pages used then, and earlier forecasts.
        self._used: dict[int, deque[tuple[int, int]]] = {}
        self._past: dict[int, deque[dict[str, Any]]] = {}

    async def snapshot(self) -> dict[str, Any]:
        """The engine at this moment. Asks the managers for their forecasts from now on."""
        state = self._state
        generations = state.generations
        counted, limit, samples = state.statistics, state.history.limit, state.history.samples
        found: dict[str, Any] = {
            "time": round(time.time(), 1),
            "status": state.status,
            "stalled": state.stalled,
            "replicas": state.replicas,
            "limit": None if limit is None else dataclasses.asdict(limit),
            "now": samples[-1]._asdict() if samples else None,
            "backlog": self._backlog(),
            "forecast_error": None,
            "pages": 0 if counted is None else counted.num_pages,
            "page_size": 0 if counted is None else counted.page_size,
            "seats": 0 if counted is None else counted.num_seats,
            "outlooks": {},
            "requests": [],
            "num_requests": state.num_running,
            "batches": await self._some_batches(),
        }
        if counted is not None and counted.num_forecasts:
            found["forecast_error"] = {
                "forecasts": counted.num_forecasts,
                "mean_pages": round(counted.num_forecast_pages_off / counted.num_forecasts, 2),
            }
        if generations is not None:
            generations.watch(_WATCH_S)
            found["outlooks"] = self._outlooks(generations)
            now = self._clock()
            first = islice(generations.in_flight(), _MAX_REQUESTS)
            found["requests"] = [_request(each, now) for each in first]
        return found

    def history(self) -> dict[str, Any]:
        """The last ten minutes, and what became of earlier forecasts."""
        return {
            "columns": Sample._fields,
            "samples": list(self._state.history.samples),
            "used": {str(number): list(used) for number, used in self._used.items()},
            "past": {str(number): list(past) for number, past in self._past.items()},
        }

    def _backlog(self) -> dict[str, Any]:
        """When everything will have ended, with a band by how earlier predictions came true."""
        generations, band = self._state.generations, self._state.metrics.eta_band
        seconds = 0.0 if generations is None else generations.backlog_s
        if seconds is None:
            return {"seconds": None, "low": None, "high": None}
        low, high = (None, None) if band is None else (seconds * band[0], seconds * band[1])
        return {"seconds": seconds, "low": low, "high": high}

    def _outlooks(self, generations: Generations) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self._num_snapshots += 1
        for number, outlook in islice(sorted(generations.outlooks().items()), _MAX_REPLICAS):
            shown = _outlook(outlook)
            found[str(number)] = shown
            used = self._used.setdefault(number, deque(maxlen=_MAX_USED))
            if not used or used[-1][0] < outlook.step:
                used.append((outlook.step, outlook.used))
            elif outlook.step < used[-1][0]:  # the replica was started again
                used.clear()
                self._past.pop(number, None)
            past = self._past.setdefault(number, deque(maxlen=_MAX_PAST))
            if self._num_snapshots % _PAST_EVERY == 1 and len(outlook.all_pages) > 1:
                kept = ("step", "stride", "all_pages")
                past.append({name: shown[name] for name in kept})
        return found

    async def _some_batches(self) -> list[Any]:
        if self._batches is None:
            return []
        try:
            found, _ = await self._batches.ask(
                self._batches.store.list_batches, after=None, limit=_MAX_BATCHES
            )
        except EngineError:  # the disk fails, or another engine has the store
            return []
        return [_batch(each) for each in found]


def _outlook(outlook: Outlook) -> dict[str, Any]:
    return {
        "step": outlook.step,
        "step_s": outlook.step_s,
        "stride": outlook.stride,
        "used": outlook.used,
        "limit": outlook.limit,
        "running_pages": outlook.running_pages.tolist(),
        "all_pages": outlook.all_pages.tolist(),
        "num_admitted": outlook.num_admitted.tolist(),
        "num_ended": outlook.num_ended.tolist(),
        "num_unseen": outlook.num_unseen,
    }


def _request(generation: Generation, now: float) -> dict[str, Any]:
    """One prompt: numbers, and nothing of its text."""
    params = generation.request.params
    began_at = generation.began_at
    return {
        "id": str(generation.request_id),
        "client": _client(generation.client),
        "age_s": round(now - generation.started_at, 1),
        "first_token_s": None if began_at is None else round(began_at - generation.started_at, 3),
        "samples": len(generation.samples),
        "prompt_tokens": generation.num_prompt_tokens,
        "max_tokens": generation.request.max_tokens,
        # Of samples that report their tokens only at the end, none before it.
        "tokens": generation.num_generated_tokens,
        "eta_s": generation.eta_s,
        "priority": int(params.priority),
    }


def _batch(batch: Batch) -> Batch:
    """A batch without what makes it large: its metadata, and all of its errors but the first."""
    errors = batch.errors
    if errors is not None:
        errors = msgspec.structs.replace(errors, data=errors.data[:1])
    return msgspec.structs.replace(batch, metadata=None, errors=errors)


def _client(name: str) -> str:
    """A key's digest is cut: enough to tell keys apart."""
    kind, _, rest = name.partition(" ")
    return f"key {rest[:_DIGITS]}" if kind == "key" else name
