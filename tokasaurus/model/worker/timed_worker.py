"""A worker that says how long each part of a batch takes, for measurements."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor, nn

from tokasaurus.config.slices import WorkerConfig
from tokasaurus.model.worker.clock import wait_for_device
from tokasaurus.model.worker.runner import Runner
from tokasaurus.model.worker.slot_state import PlannedBatch
from tokasaurus.model.worker.worker import Worker
from tokasaurus.protocol.messages import ForwardBatch

__all__ = ["PartSeconds", "TimedWorker"]


class PartSeconds(NamedTuple):
    """What a batch took.

    Attributes:
        layers_s: embedding, layers and attention.
        head_s: the head's product.
        rest_s: everything else: tables, plans, draws, and the result on the host.
    """

    layers_s: float
    head_s: float
    rest_s: float


class TimedWorker(Worker):
    """Runs batches whose rows give random tokens, and waits for the device after each part.

    The head's product is computed, and then replaced by logits that are peaked, as those of a
    trained model mostly are: ten tokens hold 94% of the probability. So filters have as much work
    as they usually have, whatever the weights are.

    Args:
        config: of a replica with one worker.
    """

    def __init__(self, config: WorkerConfig) -> None:
        super().__init__(config)
        self._timed = _TimedRunner(self._runner, self._device)
        self._runner = self._timed
        self._head = _TimedHead(self._model.head, self._device)

    def time(self, batch: ForwardBatch) -> PartSeconds:
        """Runs the batch, with the number that is due.

        Args:
            batch: any number.
        """
        batch = msgspec.structs.replace(batch, number=self._next_number)
        self._timed.seconds = self._head.seconds = 0.0
        wait_for_device(self._device)
        started = time.perf_counter()
        self.submit(batch).collect()
        seconds = time.perf_counter() - started
        layers_s, head_s = self._timed.seconds, self._head.seconds
        return PartSeconds(layers_s, head_s, seconds - layers_s - head_s)

    def fill_cache(self) -> None:
        """Writes every page, so that each has memory of its own, and numbers to multiply."""
        for tensor in self._cache.keys + self._cache.values:
            tensor.fill_(0.01)


class _TimedRunner:
    """Implements ``Runner``.

    Attributes:
        seconds: of all passes since it was set.
    """

    def __init__(self, runner: Runner, device: torch.device) -> None:
        self._runner, self._device = runner, device
        self.seconds = 0.0

    def run(self, planned: PlannedBatch) -> Tensor:
        wait_for_device(self._device)
        started = time.perf_counter()
        hidden = self._runner.run(planned)
        wait_for_device(self._device)
        self.seconds += time.perf_counter() - started
        return hidden

    def warmed_up(self) -> None:
        self._runner.warmed_up()

    @property
    def num_recompiles(self) -> int:
        return self._runner.num_recompiles

    def addresses_changed(self) -> None:
        self._runner.addresses_changed()


class _TimedHead:
    """Times a head, and replaces its logits.

    Attributes:
        seconds: of all products since it was set.
    """

    def __init__(self, head: nn.Module, device: torch.device) -> None:
        self._device = device
        self.seconds = 0.0
        self._started = 0.0
        self._logits = torch.empty(0)
        head.register_forward_pre_hook(self._start)
        head.register_forward_hook(self._stop)

    def _start(self, _module: nn.Module, _inputs: Any) -> None:
        wait_for_device(self._device)
        self._started = time.perf_counter()

    def _stop(self, _module: nn.Module, _inputs: Any, logits: Tensor) -> Tensor:
        wait_for_device(self._device)
        self.seconds += time.perf_counter() - self._started
        if len(self._logits) < len(logits):
            ranks = torch.rand_like(logits, dtype=torch.float32).argsort(dim=-1) + 1
            self._logits = (-2 * ranks.log()).to(logits.dtype)
        return self._logits[: len(logits)]
