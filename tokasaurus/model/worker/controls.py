"""Carries out controls: replaces weights, gives memory back, and writes cartridges.

Owns whether the weights and the KV cache are there. Knows nothing of numbers: the worker calls it
between two batches, when the device is idle.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from tokasaurus.cartridge_file import CartridgeFile, key_name, value_name
from tokasaurus.errors import ModelError, ProtocolError
from tokasaurus.host_memory import return_freed_memory
from tokasaurus.listing import listing
from tokasaurus.model.config import ModelConfig
from tokasaurus.model.kv_cache import KVCache
from tokasaurus.model.parallel.ranks import Ranks
from tokasaurus.model.parallel.tensor_parallel import dealt
from tokasaurus.model.upload import upload_indices
from tokasaurus.model.weights.dummy import dummy_tensors
from tokasaurus.model.weights.loader import fill_all
from tokasaurus.model.weights.weight_files import WeightFiles, read_tensors
from tokasaurus.model.weights.weights import Weights
from tokasaurus.model.worker.runner import Runner
from tokasaurus.model.worker.weights_groups import WeightsGroups
from tokasaurus.protocol.commands import (
    ControlDone,
    DeviceAction,
    JoinWeightsGroup,
    LeaveWeightsGroup,
    ReceiveWeights,
    ReleaseMemory,
    RestoreMemory,
    UpdateWeights,
    WriteCartridge,
)
from tokasaurus.rounding import ceil_div

__all__ = ["Controls", "Outcome"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """Implements ``Answer`` for a control."""

    error: str | None
    weights_ready: bool
    has_arrived: ClassVar[bool] = True

    def result(self, number: int, device_s: float) -> ControlDone:
        return ControlDone(number, self.error, self.weights_ready)


class Controls:
    """Carries out one control after the other.

    Args:
        weights: filled.
        files: that the weights came from, closed; None if they are random.
        cache: the KV cache.
        runner: is told when tensors may have moved.
        device: of all of these.
        ranks: of the replica, which all carry out the same controls: what one refuses, all do.
        model: the whole model's sizes.
        stage: the numbers of the layers that this worker has.
        groups: of trainers.
    """

    def __init__(
        self,
        weights: Weights,
        files: WeightFiles | None,
        cache: KVCache,
        runner: Runner,
        device: torch.device,
        ranks: Ranks,
        model: ModelConfig,
        stage: range,
        groups: WeightsGroups,
    ) -> None:
        self._weights, self._files, self._groups = weights, files, groups
        self._are_random = files is None
        self._cache, self._runner, self._device = cache, runner, device
        self._ranks, self._model, self._stage = ranks, model, stage
        heads = dealt(model.num_kv_heads, ranks.tp_rank, ranks.tp_size)
        self._kv_heads = slice(heads.start, heads.stop)
        self._weights_ready = self._cache_ready = True
        self._weights_allocated = True

    def check_ready(self) -> None:
        """Raises ProtocolError if a batch cannot run."""
        if not self._weights_ready:
            raise ProtocolError("it comes while the weights are released, or half written")
        if not self._cache_ready:
            raise ProtocolError("it comes while the KV cache is released")

    @torch.inference_mode()
    def carry_out(self, action: DeviceAction, number: int = 0) -> Outcome:
        """Does what is asked, or refuses and changes nothing.

        Args:
            action: what is asked.
            number: of the control, which a later report of a transfer names.

        Raises:
            ModelError: the weights are half written. The process has to end.
            ProtocolError: the manager should not have asked.
        """
        error = None
        try:
            match action:
                case UpdateWeights():
                    if action.is_received:
                        self._take_received(action)
                    else:
                        self._update(action)
                case ReleaseMemory():
                    self._release(action)
                case RestoreMemory():
                    self._restore(action)
                case WriteCartridge():
                    self._write_cartridge(action)
                case JoinWeightsGroup():
                    with self._refusing_together():
                        self._groups.check_join(action)
                    self._groups.join(number, action)
                case ReceiveWeights():
                    with self._refusing_together():
                        self._groups.check_receive(action)
                    self._groups.receive(number, action)
                case LeaveWeightsGroup():
                    self._groups.leave(action.group)
        except _Refusal as refusal:
            error = str(refusal)
            log.warning("refused %s: %s", type(action).__name__, error)
        # All have carried it out when one of them answers.
        self._weights_ready = self._ranks.all_agree(self._weights_ready)
        return Outcome(error, self._weights_ready)

    def _update(self, action: UpdateWeights) -> None:
        started = time.perf_counter()
        source = f"the update to version {action.version}"
        with contextlib.ExitStack() as opened:
            with self._refusing_together():
                files = opened.enter_context(WeightFiles([Path(f) for f in action.files], source))
                files.check(self._weights)
                if action.checksums:
                    files.check_sums(action.checksums)
                files.check_unchanged()
            checked = time.perf_counter()
            self._fill(lambda: fill_all(self._weights, files.tensors(), source))
        self._files, self._are_random = files, False
        log.info(
            "updated the weights to version %d from %d files in %.1f s, after %.1f s of checks",
            action.version,
            files.num_files,
            time.perf_counter() - checked,
            checked - started,
        )

    def _take_received(self, action: UpdateWeights) -> None:
        started, staged = time.perf_counter(), self._groups.staged
        with self._refusing_together():
            if missing := staged.missing():
                raise ModelError(f"these tensors have not come: {listing(missing)}")
        self._fill(staged.fill)
        # They came from no file: after a release of memory only another update brings weights.
        self._files, self._are_random = None, False
        log.info(
            "updated the weights to version %d from a trainer's group in %.1f s",
            action.version,
            time.perf_counter() - started,
        )

    def _release(self, action: ReleaseMemory) -> None:
        if action.weights:
            self._weights_ready = self._weights_allocated = False
            self._weights.release()
        if action.kv_cache:
            self._cache_ready = False
            self._cache.release()
        if action.weights or action.kv_cache:
            # Before memory is returned: a runner may have some that is of no use now.
            self._runner.addresses_changed()
        self._return_memory()

    def _restore(self, action: RestoreMemory) -> None:
        if action.kv_cache and not self._cache_ready:
            self._cache.restore()
            self._cache_ready = True
        if action.weights and not self._weights_ready:
            self._read_weights_again()

    def _read_weights_again(self) -> None:
        if self._are_random:
            tensors = dummy_tensors(self._weights.shapes)
            self._fill(lambda: fill_all(self._weights, tensors, "random weights"))
            return
        if self._files is None:
            log.warning("the weights came from a trainer and stay released until the next update")
            return
        try:
            files = self._files.reopened()
        except ModelError as error:
            log.warning("the weights stay released until the next update: %s", error)
            return
        with files:
            self._fill(lambda: fill_all(self._weights, files.tensors(), files.source))

    def _fill(self, fill: Callable[[], None]) -> None:
        """Fills all weights. A failure leaves them half written."""
        self._weights_ready = False
        try:
            if not self._weights_allocated:
                self._weights.restore()
                self._weights_allocated = True
            fill()
        except Exception as error:
            raise ModelError(
                f"the weights are half written, so the engine cannot go on ({error}); "
                "start it again"
            ) from error
        self._weights_ready = True
        self._runner.addresses_changed()
        self._return_memory()

    def _write_cartridge(self, action: WriteCartridge) -> None:
        self._check_pages(action)
        cache = self._cache
        with self._refusing_together():
            files = self._read_cartridge(action)

        def joined(name: str) -> Tensor:
            """[kv_heads, num_tokens, head_dim]"""
            parts = [tensors[name].to(cache.heads_dtype) for tensors in files]
            return torch.cat(parts).transpose(0, 1)

        cache.write_pages(
            upload_indices(action.pages, self._device),
            [joined(key_name(layer)) for layer in self._stage],
            [joined(value_name(layer)) for layer in self._stage],
            action.num_tokens,
        )

    def _read_cartridge(self, action: WriteCartridge) -> list[dict[str, Tensor]]:
        """This rank's part of a cartridge, for each of its files."""
        files = [self._read_cartridge_file(Path(path)) for path in action.paths]
        num_tokens = sum(len(next(iter(tensors.values()))) for tensors in files)
        if num_tokens != action.num_tokens:
            raise ModelError(
                f"{listing(list(action.paths))}: there are {num_tokens} tokens, where "
                f"{action.num_tokens} were announced; load it again"
            )
        return files

    def _read_cartridge_file(self, path: Path) -> dict[str, Tensor]:
        """Copies of the tensors, so that the file may change at once."""
        model = self._model
        names = {name(layer) for layer in self._stage for name in (key_name, value_name)}
        with CartridgeFile(path) as file:
            file.check(model.num_layers, model.num_kv_heads, model.head_dim)
            return {
                name: tensor[:, self._kv_heads].clone()
                for name, tensor in read_tensors(file)
                if name in names
            }

    def _check_pages(self, action: WriteCartridge) -> None:
        pages = action.pages
        if not self._cache_ready:
            raise ProtocolError("it comes while the KV cache is released")
        if len(pages) != ceil_div(action.num_tokens, self._cache.page_size):
            raise ProtocolError(f"it has {len(pages)} pages for {action.num_tokens} tokens")
        if len(np.unique(pages)) != len(pages):
            raise ProtocolError("it names a page twice")
        if len(pages) and (pages.min() < 0 or pages.max() >= self._cache.num_pages):
            raise ProtocolError(
                f"its pages range from {pages.min()} to {pages.max()}, the limit is "
                f"{self._cache.num_pages}"
            )

    @contextlib.contextmanager
    def _refusing_together(self) -> Iterator[None]:
        """For checks: what is wrong with a file at one rank is a reason for all to refuse."""
        reason = None
        try:
            yield
        except ModelError as error:
            reason = str(error)
        reason = self._ranks.agreed(reason)
        if reason is not None:
            raise _Refusal(reason)

    def _return_memory(self) -> None:
        """Gives what tensors have freed back to the system."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return_freed_memory()


class _Refusal(Exception):
    """A control cannot be carried out, and nothing has changed."""
