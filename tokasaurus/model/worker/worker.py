"""The worker runs numbered batches and controls in order, with one model and one KV cache.

The host prepares a batch while the device still runs the former ones::

    host      submit 0 │ submit 1 │ collect 0 │ submit 2 │ collect 1 ...
    device             └── batch 0 ───────────┴── batch 1 ───────────┴── batch 2 ...

It knows nothing of processes and sockets: the launch room carries batches in and results out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tokasaurus.config.slices import WorkerConfig
from tokasaurus.errors import ConfigError, ProtocolError
from tokasaurus.grammars import Vocabulary
from tokasaurus.host_memory import keep_freed_memory
from tokasaurus.model.backend.base import NO_GROUPED_ROWS, GroupedRows
from tokasaurus.model.download import Download
from tokasaurus.model.kv_cache import KVCache
from tokasaurus.model.parallel.ranks import Ranks
from tokasaurus.model.sampling.drawing import draw_tokens, give_logits, score_prompts
from tokasaurus.model.sampling.logprobs import Logprobs
from tokasaurus.model.sampling.matchers import Matchers, OpenMatchers
from tokasaurus.model.sampling.slot_names import SlotNames
from tokasaurus.model.weights.weights import Weights
from tokasaurus.model.worker.clock import Clock, HostClock, start_clock, wait_for_device
from tokasaurus.model.worker.controls import Controls
from tokasaurus.model.worker.device_memory import DeviceMemory, open_device_memory
from tokasaurus.model.worker.identity import make_identity
from tokasaurus.model.worker.loading import choose_kernels, load
from tokasaurus.model.worker.memory_profile import measure, trial_pages
from tokasaurus.model.worker.pending import Answer, InFlight, Outputs, Pending, naming
from tokasaurus.model.worker.pipeline import Pipeline
from tokasaurus.model.worker.runners import make_runner
from tokasaurus.model.worker.slot_state import HISTORY_BYTES, PlannedBatch, SlotState
from tokasaurus.model.worker.warm_up import warm_up_batches
from tokasaurus.model.worker.weights_groups import Report, WeightsGroups
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.protocol.commands import Control
from tokasaurus.protocol.identity import WorkerIdentity
from tokasaurus.protocol.messages import ForwardBatch, ToWorker

__all__ = ["Worker"]

log = logging.getLogger(__name__)


class Worker:
    """Owns the model and everything on the device.

    Args:
        config: the model room's slice.
        load_vocabulary: returns the bytes of each id, for grammars. Another thread calls it while
            the model is loaded. None means that no sequence will have a grammar.
        rendezvous: where the workers of the replica meet, see ``Ranks``; None if it has one.
        replica: the number of the replica.
        report: tells the manager how a transfer of weights ended; without it there are none.

    Attributes:
        ranks: the workers of the replica.
        num_pages: of the KV cache; where memory can be measured, only after ``warm_up``.

    Raises:
        ModelError: the checkpoint cannot be served. It names the file, tensor or field.
        ConfigError: the attention, instruction set or determinism asked for is not available on
            this machine.
    """

    def __init__(
        self,
        config: WorkerConfig,
        load_vocabulary: Callable[[], Vocabulary] | None = None,
        rendezvous: str | None = None,
        *,
        replica: int = 0,
        report: Report | None = None,
    ) -> None:
        keep_freed_memory()
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self._config = config
        self._device = _device(config)
        kernels = choose_kernels(config, self._device)
        self._vocab_size = kernels.model.vocab_size
        self.ranks = Ranks(
            config.rank, config.tp_size, config.pp_size, rendezvous, device=self._device
        )
        vocabulary = load_vocabulary if self.ranks.samples else None
        names = SlotNames()
        self._matchers = Matchers(config.num_slots, self._vocab_size, vocabulary, names)
        loaded = load(config, kernels, self.ranks)
        self._kernels, self._loaded, self._model = kernels, loaded, loaded.model
        self._memory = open_device_memory(self._device)
        self.num_pages = config.num_pages if self._memory is None else trial_pages(config)
        heads = kernels.heads
        self._cache = KVCache.allocate(
            num_layers=len(loaded.stage),
            num_pages=self.num_pages,
            page_size=config.page_size,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
            dtype=heads.dtype,
            device=self._device,
            kept_dtype=heads.kept_dtype,
        )
        self._backend = kernels.backend(self._cache, heads.num_heads, kernels.options)
        self._state = SlotState(
            num_slots=config.num_slots,
            num_pages=self.num_pages,
            page_size=config.page_size,
            max_request_tokens=config.max_request_tokens,
            vocab_size=self._vocab_size,
            device=self._device,
            kernels=loaded.sampling,
            names=names,
        )
        self._runner = make_runner(config, kernels, loaded, self._backend, self._state.page_table)
        self._controls = Controls(
            loaded.weights,
            loaded.files,
            self._cache,
            self._runner,
            self._device,
            self.ranks,
            kernels.model,
            loaded.stage,
            WeightsGroups(loaded.weights, self.ranks, self._device, replica, report),
        )
        self._pipeline = Pipeline(
            self.ranks,
            config.num_slots,
            kernels.model.hidden_size,
            heads.dtype,
            self._state.record,
        )
        self._in_flight = InFlight()
        self._next_number = 0
        log.info("%s", self.determinism_reason)

    @property
    def weights(self) -> Weights:
        """Of the model; they can be filled anew between batches."""
        return self._loaded.weights

    @property
    def is_deterministic(self) -> bool:
        """Whether a request gets the same bits whatever runs beside it."""
        return self._loaded.determinism.is_on

    @property
    def determinism_reason(self) -> str:
        """Why, or why not; a line for users."""
        return self._loaded.determinism.reason

    def warm_up(self) -> float:
        """Runs the largest possible batches, so that a lack of memory shows now.

        Where the memory of the device can be measured, the KV cache gets its size here. Also waits
        for the vocabulary. Call it before the first ``submit``. It leaves the slot tables as new.

        Returns:
            About how long a batch of ``max_tokens_per_forward`` takes, in seconds.

        Raises:
            ConfigError: the memory that was measured is too small for the flags.
        """
        started = time.perf_counter()
        self._backend.calibrate(self.ranks.of_first)
        if self._memory is not None:
            self._fit_kv_cache(self._memory)
        token_s = self._run_largest_batches()
        self._runner.warmed_up()
        self._matchers.wait()
        cache = self._cache
        log.info(
            "warmed up in %.1f s; the KV cache has %d pages for %d tokens in %s: %.1f MB when full",
            time.perf_counter() - started,
            cache.num_pages,
            cache.num_pages * cache.page_size,
            str(cache.dtype).removeprefix("torch."),
            cache.num_bytes / 1e6,
        )
        # The first batches load libraries, too, and may compile: the quickest counts.
        return token_s * self._config.max_tokens_per_forward

    def _run_largest_batches(self) -> float:
        """Leaves the tables as new. Returns the least seconds that a token of a batch took."""
        matchers = OpenMatchers(self._vocab_size)
        token_s = []
        # The same batches at all ranks.
        num_parameters = self.ranks.largest(self.weights.num_parameters)
        config = replace(self._config, num_pages=self.num_pages)
        for batch in warm_up_batches(config, num_parameters):
            begun = time.perf_counter()
            self._enqueue(batch, matchers).result(batch.number, 0.0)
            num_tokens = len(batch.prefill_ids) + len(batch.decode_slots)
            token_s.append((time.perf_counter() - begun) / num_tokens)
        self._pipeline.clear()
        self._state.clear()
        return min(token_s)

    def _fit_kv_cache(self, memory: DeviceMemory) -> None:
        """Gives the KV cache the pages that all ranks of the replica have room for."""
        config, cache = self._config, self._cache
        page_bytes = cache.num_bytes // cache.num_pages
        measured = measure(
            memory,
            config,
            self._run_largest_batches,
            self._runner.warmed_up,
            cache_bytes=cache.num_bytes,
            attention=self._backend.workspace_bytes(
                config.max_tokens_per_forward, config.max_request_tokens
            ),
            token=page_bytes // cache.page_size + HISTORY_BYTES,
        )
        log.info("memory, measured: %s", measured)
        fitting = min(measured.pages(config.page_size), config.most_pages)
        if (reason := self.ranks.agreed(measured.why_not(config, fitting))) is not None:
            raise ConfigError(reason)
        self.num_pages = -self.ranks.largest(-fitting)
        cache.resize(self.num_pages)
        self._state.set_num_pages(self.num_pages)
        self._runner.addresses_changed()

    def identity(self) -> WorkerIdentity:
        """What its results follow from, beside the requests."""
        return make_identity(
            self._config,
            self._kernels.model,
            self._loaded.files,
            attention=self._backend.name,
            linear=self._kernels.place.linear,
            is_deterministic=self.is_deterministic,
            determinism_reason=self.determinism_reason,
        )

    def submit(self, message: ToWorker) -> Pending:
        """Enqueues one batch, or carries out one control.

        A batch does not wait for the device. On the CPU the batch runs here. A control is carried
        out here: after the device has done all batches before it, which can be collected later.

        A batch waits for the masks of rows with a grammar, which follow from the ids of the
        previous batch. This wait comes after the layers of this batch are enqueued, and counts as
        ``grammar_wait_s``. Nothing else waits.

        Raises:
            ProtocolError: the message is not the next one. Or it names slots, pages, ids or
                positions that cannot exist. Or it is a batch, and memory for it is released.
            EngineError: the batch or control failed; names it. After a control that failed the
                process has to end.
        """
        name = _name(message)
        if message.number != self._next_number:
            raise ProtocolError(f"{name} came, number {self._next_number} was due")
        self._next_number += 1
        with naming(name):
            if isinstance(message, Control):
                wait_for_device(self._device)
                clock: Clock = HostClock()
                answer: Answer = self._controls.carry_out(message.action, message.number)
                wait_for_device(self._device)
            else:
                self._controls.check_ready()
                clock = start_clock(self._device)
                answer = self._enqueue(message, self._matchers)
            clock.stop()
        return self._in_flight.add(message.number, name, answer, clock)

    @torch.inference_mode()
    def read_pages(self, pages: Int32Array, num_tokens: int) -> tuple[list[Tensor], list[Tensor]]:
        """The keys and values of consecutive positions that collected batches have computed.

        Args:
            pages: [ceil(num_tokens / page_size)], in order of position.

        Returns:
            For each layer of this worker [kv_heads, num_tokens, head_dim], keys after RoPE; copies
            on the device.
        """
        return self._cache.read_pages(torch.from_numpy(pages).long().to(self._device), num_tokens)

    @property
    def grammar_wait_s(self) -> float:
        """Seconds that ``submit`` has waited for the masks of grammars, in all batches."""
        return self._matchers.waited_s

    @torch.inference_mode()
    def _enqueue(self, batch: ForwardBatch, matchers: Matchers | OpenMatchers) -> Outputs:
        pipeline, waited_s = self._pipeline, self._pipeline.waited_s
        pipeline.need_tokens_of(batch.decode_slots)
        planned = self._state.apply(batch)
        if self.ranks.samples and batch.parameters is not None:
            # Grammars are compiled while the layers run.
            matchers.enter(batch.parameters)
        hidden = self._run_layers(planned)
        grouped = self._backend.grouped_rows if planned.num_rows else NO_GROUPED_ROWS
        waited_s = pipeline.waited_s - waited_s
        if not self.ranks.samples:
            if self.ranks.is_last_stage:
                give_logits(self._model, hidden, planned.sampling, planned.prompt)
            pipeline.expect_tokens(planned.sampling)
            return Outputs.of_other_rank(waited_s)
        return self._sample(planned, hidden, matchers, grouped, waited_s)

    def _run_layers(self, planned: PlannedBatch) -> Tensor:
        """The stage's hidden states, which it hands on if it is not the last."""
        if not self.ranks.is_first_stage:
            planned = replace(planned, inputs=self._pipeline.receive_hidden(planned.num_rows))
        if planned.early_copies is not None:
            early = planned.early_copies
            self._cache.copy_pages(early.sources.tensor, early.targets.tensor)
        hidden = self._runner.run(planned)
        if not self.ranks.is_last_stage:
            self._pipeline.send_hidden(hidden)
        if planned.copies is not None:
            copies = planned.copies
            self._cache.copy_pages(copies.sources.tensor, copies.targets.tensor)
        return hidden

    def _sample(
        self,
        planned: PlannedBatch,
        hidden: Tensor,
        matchers: Matchers | OpenMatchers,
        grouped: GroupedRows,
        waited_s: float,
    ) -> Outputs:
        sampling = planned.sampling
        masks = matchers.masks(sampling.slots)
        token_ids, drawn = draw_tokens(self._model, hidden, sampling, masks)
        self._pipeline.send_tokens(token_ids)
        arriving = Download(token_ids)
        if masks is not None:
            matchers.advance(masks, sampling.slots, arriving)
        self._state.record(sampling, token_ids)
        lost = sampling.recording.lost if sampling.recording is not None else None
        given_up = masks.cut_rows if masks is not None else None
        prompt = score_prompts(self._model, hidden, planned.prompt) if planned.prompt else None
        pooled = self._state.pooler.pool(planned.pooling, hidden) if planned.pooling else None
        return Outputs(
            arriving,
            drawn or Logprobs.none(0, len(token_ids)),
            prompt or Logprobs.none(0, 0),
            pooled,
            _union(lost, given_up),
            grouped,
            self._runner.num_recompiles,
            waited_s,
        )


def _device(config: WorkerConfig) -> torch.device:
    if config.device_index is None:
        return torch.device(config.device)
    device = torch.device(config.device, config.device_index)
    torch.cuda.set_device(device)  # for kernels and streams that name no device
    return device


def _name(message: ToWorker) -> str:
    """For errors."""
    if isinstance(message, Control):
        return f"control {message.number} ({type(message.action).__name__})"
    return f"batch {message.number}"


def _union(one: Int32Array | None, other: Int32Array | None) -> Int32Array | None:
    """Rows that are in either, each once and ascending."""
    present = [rows for rows in (one, other) if rows is not None]
    return np.unique(np.concatenate(present)) if present else None
