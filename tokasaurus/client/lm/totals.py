"""What all calls of a client have cost together."""

from __future__ import annotations

import threading

from pydantic import BaseModel

from tokasaurus.client.lm.language_model import LLMResponseMetrics

__all__ = ["TotalUsage", "Totals"]


class TotalUsage(BaseModel):
    """Sums over calls.

    Attributes:
        calls: that have an answer.
        failures: calls that have none.
        retries: attempts after the first, of all calls.
        duration: seconds, summed over calls, many of which run at the same time.
        input_tokens, output_tokens, total_tokens: of calls with an answer.
    """

    calls: int = 0
    failures: int = 0
    retries: int = 0
    duration: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0


class Totals:
    """A :class:`TotalUsage` that threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._usage = TotalUsage()

    def now(self) -> TotalUsage:
        """The sums so far."""
        with self._lock:
            return self._usage.model_copy()

    def add(self, metrics: LLMResponseMetrics) -> None:
        """Counts a call that has its answer."""
        with self._lock:
            self._usage.calls += 1
            self._usage.retries += metrics.retries
            self._usage.duration += metrics.duration
            self._usage.input_tokens += metrics.input_tokens
            self._usage.output_tokens += metrics.output_tokens
            self._usage.total_tokens += metrics.total_tokens

    def add_failure(self, retries: int) -> None:
        """Counts a call that has none."""
        with self._lock:
            self._usage.failures += 1
            self._usage.retries += retries
