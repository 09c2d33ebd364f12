"""Batches that the device works on, and their results on the way to the host."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from tokasaurus.errors import EngineError, ProtocolError
from tokasaurus.model.download import Download
from tokasaurus.model.sampling.sampler import Logprobs
from tokasaurus.model.worker.clock import Clock
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.protocol.messages import ForwardResult

__all__ = ["InFlight", "Outputs", "Pending", "naming_batch"]


class Outputs:
    """What a batch gives, once it has arrived on the host.

    Args:
        token_ids: [sampling rows].
        drawn: logprobs of these tokens.
        prompt: logprobs of prompt tokens.
        pooled: [pooled prompts, hidden], or None.
        cut_rows: as in ``ForwardResult``.
    """

    def __init__(
        self,
        token_ids: Download,
        drawn: Logprobs,
        prompt: Logprobs,
        pooled: Tensor | None,
        cut_rows: Int32Array | None,
    ) -> None:
        self._token_ids = token_ids
        self._drawn = [Download(each) for each in (drawn.chosen, drawn.top_ids, drawn.top)]
        self._prompt = [
            Download(each) for each in (prompt.chosen, prompt.ranks, prompt.top_ids, prompt.top)
        ]
        self._pooled = None if pooled is None or not len(pooled) else Download(pooled)
        self._cut_rows = cut_rows

    def result(self, number: int, device_s: float) -> ForwardResult:
        """Waits for the copies, and puts them into a message."""
        logprobs, top_ids, top_logprobs = (each.array() for each in self._drawn)
        prompt_logprobs, ranks, prompt_top_ids, prompt_top = (each.array() for each in self._prompt)
        return ForwardResult(
            number=number,
            token_ids=self._token_ids.array().astype(np.int32),
            logprobs=logprobs,
            top_ids=top_ids.astype(np.int32),
            top_logprobs=top_logprobs,
            prompt_logprobs=prompt_logprobs,
            prompt_ranks=ranks.astype(np.int32),
            prompt_top_ids=prompt_top_ids.astype(np.int32),
            prompt_top_logprobs=prompt_top,
            device_s=device_s,
            pooled=None if self._pooled is None else self._pooled.array(),
            cut_rows=self._cut_rows,
        )


class Pending:
    """One batch in flight; ``InFlight.add`` makes it."""

    def __init__(self, number: int, outputs: Outputs, clock: Clock, batches: InFlight) -> None:
        self.number = number
        self._outputs = outputs
        self._clock = clock
        self._batches = batches

    @property
    def is_done(self) -> bool:
        """Whether ``collect`` would return without waiting."""
        return self._clock.is_done

    def collect(self) -> ForwardResult:
        """Waits for the batch. Batches are collected once each, in the order of their numbers.

        Raises:
            ProtocolError: it was collected before, or an earlier batch was not.
            EngineError: the device failed; names the batch.
        """
        self._batches.remove(self)
        with naming_batch(self.number):
            device_s = self._clock.wait()
            return self._outputs.result(self.number, device_s)


class InFlight:
    """The batches that were submitted and not collected yet, oldest first."""

    def __init__(self) -> None:
        self._batches: deque[Pending] = deque()

    def add(self, number: int, outputs: Outputs, clock: Clock) -> Pending:
        pending = Pending(number, outputs, clock, self)
        self._batches.append(pending)
        return pending

    def remove(self, pending: Pending) -> None:
        """Removes the oldest batch.

        Raises:
            ProtocolError: this is another one.
        """
        if pending not in self._batches:
            raise ProtocolError(f"batch {pending.number} was collected before")
        oldest = self._batches[0]
        if pending is not oldest:
            raise ProtocolError(f"batch {pending.number} is collected before batch {oldest.number}")
        self._batches.popleft()


@contextlib.contextmanager
def naming_batch(number: int) -> Iterator[None]:
    """Puts the batch's number into the messages of errors.

    Raises:
        ProtocolError: from a ``ProtocolError``.
        EngineError: from any other exception.
    """
    try:
        yield
    except ProtocolError as error:
        raise ProtocolError(f"batch {number}: {error}") from error
    except Exception as error:
        raise EngineError(f"batch {number}: {type(error).__name__}: {error}") from error
