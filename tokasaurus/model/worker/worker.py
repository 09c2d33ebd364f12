"""The worker runs numbered batches in order, with one model, one KV cache and one set of tables.

It knows nothing of processes and sockets: the launch room carries batches in and results out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tokasaurus.config.slices import WorkerConfig
from tokasaurus.errors import ProtocolError
from tokasaurus.grammars import Vocabulary
from tokasaurus.model.backend import make_backend
from tokasaurus.model.facts import read_model_config
from tokasaurus.model.kv_cache import KVCache
from tokasaurus.model.placement import Placement
from tokasaurus.model.sampling.drawing import draw_tokens, score_prompts
from tokasaurus.model.sampling.matchers import Matchers, TokenMasks
from tokasaurus.model.sampling.sampler import Logprobs
from tokasaurus.model.weights.loader import load_model
from tokasaurus.model.worker.pooling import Pooler
from tokasaurus.model.worker.slot_state import PlannedBatch, SlotState
from tokasaurus.model.worker.warm_up import warm_up_batches
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.protocol.messages import ForwardBatch, ForwardResult

__all__ = ["Worker"]

log = logging.getLogger(__name__)

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Worker:
    """Owns the model and everything on the device.

    Args:
        config: the model room's slice.
        load_vocabulary: returns the bytes of each id, for grammars. Another thread calls it while
            the model is loaded. None means that no sequence will have a grammar.

    Attributes:
        weights: of the model; they can be filled anew between batches.

    Raises:
        ModelError: the checkpoint cannot be served. It names the file, tensor or field.
        ConfigError: the attention asked for is not available on this machine.
    """

    def __init__(
        self, config: WorkerConfig, load_vocabulary: Callable[[], Vocabulary] | None = None
    ) -> None:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self._config = config
        self._device = torch.device(config.device)
        place = Placement(_DTYPES[config.dtype], self._device, config.linear)
        model_config = read_model_config(config.model_path, config.rope_scaling)
        self._vocab_size = model_config.vocab_size
        self._matchers = Matchers(config.num_slots, self._vocab_size, load_vocabulary)
        self._model, self.weights = load_model(
            config.model_path, model_config, place, config.load_format
        )
        self._cache = KVCache.allocate(
            num_layers=model_config.num_layers,
            num_pages=config.num_pages,
            page_size=config.page_size,
            num_kv_heads=model_config.num_kv_heads,
            head_dim=model_config.head_dim,
            dtype=place.dtype,
            device=place.device,
        )
        self._backend = make_backend(
            config.attention, self._cache, model_config.num_heads, self._device
        )
        self._state = self._fresh_state()
        self._pooler = Pooler()
        self._next_number = 0
        log.info(
            "KV cache of %d pages for %d tokens in %s: %.1f MB when full",
            config.num_pages,
            config.num_pages * config.page_size,
            config.dtype,
            self._cache.num_bytes / 1e6,
        )

    def warm_up(self) -> None:
        """Runs the largest possible batches, so that a lack of memory shows now.

        Also waits for the vocabulary. Call it before the first ``run``. It leaves the slot tables
        as new.
        """
        started = time.perf_counter()
        for batch in warm_up_batches(self._config, self.weights.num_parameters):
            count = len(batch.decode_slots) + len(batch.draw_slots)
            self._run(batch, TokenMasks.of_everything(count, self._vocab_size))
        self._state = self._fresh_state()
        self._matchers.wait()
        log.info("warmed up in %.1f s", time.perf_counter() - started)

    def run(self, batch: ForwardBatch) -> ForwardResult:
        """Runs one batch to its end.

        Raises:
            ProtocolError: the batch is not the next one, or it names slots, pages, ids or positions
                that cannot exist.
        """
        if batch.number != self._next_number:
            raise ProtocolError(f"batch {batch.number} came, batch {self._next_number} was due")
        self._next_number += 1
        return self._run(batch)

    @torch.inference_mode()
    def _run(self, batch: ForwardBatch, warm_up_masks: TokenMasks | None = None) -> ForwardResult:
        started = time.perf_counter()
        planned = self._state.apply(batch)
        if batch.parameters is not None:
            self._matchers.enter(batch.parameters)
        hidden = self._forward(planned)
        if planned.copies is not None:
            self._cache.copy_pages(planned.copies.sources, planned.copies.targets)
        masks = self._matchers.masks(planned.sampling.slots)
        token_ids, drawn = draw_tokens(
            self._model, hidden, planned.sampling, self._state.adjustments, masks or warm_up_masks
        )
        if masks is not None:
            self._matchers.advance(masks, planned.sampling.slots, token_ids)
        lost = self._state.record(planned.sampling.slots, token_ids)
        given_up = masks.cut_rows if masks is not None else None
        prompt = score_prompts(self._model, hidden, planned.prompt) if planned.prompt else None
        pooled = self._pooler.pool(batch, hidden)
        return _result(
            number=batch.number,
            token_ids=token_ids,
            drawn=drawn or Logprobs.none(0, len(token_ids)),
            prompt=prompt or Logprobs.none(0, 0),
            pooled=pooled,
            cut_rows=_union(lost, given_up),
            device_s=time.perf_counter() - started,
        )

    def _forward(self, planned: PlannedBatch) -> Tensor:
        """Hidden states of all rows, [rows, hidden]."""
        # A batch may consist of changes to the tables, without any row.
        if not len(planned.ids):
            return torch.empty(0, 0, device=self._device)
        attention = self._backend.plan(planned.sequences)
        hidden: Tensor = self._model(planned.ids, planned.positions, attention)
        return hidden

    def _fresh_state(self) -> SlotState:
        return SlotState(
            num_slots=self._config.num_slots,
            num_pages=self._config.num_pages,
            page_size=self._config.page_size,
            max_request_tokens=self._config.max_request_tokens,
            vocab_size=self._vocab_size,
            device=self._device,
        )


def _result(
    *,
    number: int,
    token_ids: Tensor,
    drawn: Logprobs,
    prompt: Logprobs,
    pooled: Tensor | None,
    cut_rows: Int32Array | None,
    device_s: float,
) -> ForwardResult:
    return ForwardResult(
        number=number,
        token_ids=token_ids.cpu().numpy().astype(np.int32),
        logprobs=drawn.chosen.cpu().numpy(),
        top_ids=drawn.top_ids.cpu().numpy().astype(np.int32),
        top_logprobs=drawn.top.cpu().numpy(),
        prompt_logprobs=prompt.chosen.cpu().numpy(),
        prompt_ranks=prompt.ranks.cpu().numpy().astype(np.int32),
        prompt_top_ids=prompt.top_ids.cpu().numpy().astype(np.int32),
        prompt_top_logprobs=prompt.top.cpu().numpy(),
        device_s=device_s,
        pooled=None if pooled is None or not len(pooled) else pooled.cpu().numpy(),
        cut_rows=cut_rows,
    )


def _union(one: Int32Array | None, other: Int32Array | None) -> Int32Array | None:
    """Rows that are in either, each once and ascending."""
    present = [rows for rows in (one, other) if rows is not None]
    return np.unique(np.concatenate(present)) if present else None
