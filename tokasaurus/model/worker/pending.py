"""Batches and controls that the device works on, and their results on the way to the host."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tokasaurus.errors import EngineError, ProtocolError
from tokasaurus.model.backend.base import NO_GROUPED_ROWS, GroupedRows
from tokasaurus.model.download import Download
from tokasaurus.model.sampling.logprobs import Logprobs
from tokasaurus.model.worker.clock import Clock
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.protocol.messages import ForwardResult, FromWorker

__all__ = ["Answer", "InFlight", "Outputs", "Pending", "naming"]


class Answer(Protocol):
    """What a batch or a control gives, perhaps still on its way to the host."""

    @property
    def has_arrived(self) -> bool:
        """Whether ``result`` would return without waiting."""
        ...

    def result(self, number: int, device_s: float) -> FromWorker:
        """Waits for its arrival, and puts it into a message."""
        ...


class Outputs:
    """Implements ``Answer`` for a batch.

    Args:
        token_ids: [sampling rows].
        drawn: logprobs of these tokens.
        prompt: logprobs of prompt tokens.
        pooled: [pooled prompts, hidden], or None.
        cut_rows: as in ``ForwardResult``.
        grouped: as ``num_grouped_tokens`` and ``num_grouped_prefill_tokens`` there.
        num_recompiles: as in ``ForwardResult``.
        waited_s: as in ``ForwardResult``.
    """

    def __init__(
        self,
        token_ids: Download,
        drawn: Logprobs,
        prompt: Logprobs,
        pooled: Tensor | None,
        cut_rows: Int32Array | None,
        grouped: GroupedRows,
        num_recompiles: int,
        waited_s: float,
    ) -> None:
        self._token_ids = token_ids
        self._drawn = [Download(each) for each in (drawn.chosen, drawn.top_ids, drawn.top)]
        self._prompt = [
            Download(each) for each in (prompt.chosen, prompt.ranks, prompt.top_ids, prompt.top)
        ]
        self._pooled = None if pooled is None or not len(pooled) else Download(pooled)
        self._cut_rows = cut_rows
        self._grouped = grouped
        self._num_recompiles = num_recompiles
        self._waited_s = waited_s

    @classmethod
    def of_other_rank(cls, waited_s: float) -> Outputs:
        """Of a rank that does not sample. Its results go nowhere."""
        nothing = Logprobs.none(0, 0)
        no_ids = Download(torch.empty(0, dtype=torch.int64))
        return cls(no_ids, nothing, nothing, None, None, NO_GROUPED_ROWS, 0, waited_s)

    @property
    def has_arrived(self) -> bool:
        pooled = () if self._pooled is None else (self._pooled,)
        downloads = (self._token_ids, *self._drawn, *self._prompt, *pooled)
        return all(each.has_arrived for each in downloads)

    def result(self, number: int, device_s: float) -> ForwardResult:
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
            num_grouped_tokens=self._grouped.num_decodes,
            num_grouped_prefill_tokens=self._grouped.num_prefills,
            num_recompiles=self._num_recompiles,
            waited_s=self._waited_s,
        )


class Pending:
    """One batch or control in flight; ``InFlight.add`` makes it.

    Attributes:
        number: its own, in one sequence over both.
        name: for errors, such as "batch 3".
    """

    def __init__(
        self, number: int, name: str, answer: Answer, clock: Clock, in_flight: InFlight
    ) -> None:
        self.number = number
        self.name = name
        self._answer = answer
        self._clock = clock
        self._in_flight = in_flight

    @property
    def is_done(self) -> bool:
        """Whether ``collect`` would return without waiting."""
        return self._clock.is_done and self._answer.has_arrived

    def collect(self) -> FromWorker:
        """Waits for the end. Each is collected once, in the order of the numbers.

        Raises:
            ProtocolError: it was collected before, or an earlier one was not.
            EngineError: the device failed; names the batch.
        """
        self._in_flight.remove(self)
        with naming(self.name):
            device_s = self._clock.wait()
            return self._answer.result(self.number, device_s)


class InFlight:
    """The batches and controls that were submitted and not collected yet, oldest first."""

    def __init__(self) -> None:
        self._pending: deque[Pending] = deque()

    def add(self, number: int, name: str, answer: Answer, clock: Clock) -> Pending:
        pending = Pending(number, name, answer, clock, self)
        self._pending.append(pending)
        return pending

    def remove(self, pending: Pending) -> None:
        """Removes the oldest.

        Raises:
            ProtocolError: this is another one.
        """
        if pending not in self._pending:
            raise ProtocolError(f"{pending.name} was collected before")
        oldest = self._pending[0]
        if pending is not oldest:
            raise ProtocolError(f"{pending.name} is collected before {oldest.name}")
        self._pending.popleft()


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Puts the name of a batch or control before the messages of errors.

    Raises:
        ProtocolError: from a ``ProtocolError``.
        EngineError: from any other exception.
    """
    try:
        yield
    except ProtocolError as error:
        raise ProtocolError(f"{name}: {error}") from error
    except Exception as error:
        raise EngineError(f"{name}: {type(error).__name__}: {error}") from error
