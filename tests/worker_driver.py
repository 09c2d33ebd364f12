"""Drives a worker in tests, batch by batch, in the place of a manager."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tokasaurus.config.slices import WorkerConfig
from tokasaurus.model.worker.pending import Pending
from tokasaurus.model.worker.worker import Worker
from tokasaurus.protocol.commands import Control, ControlDone, DeviceAction
from tokasaurus.protocol.messages import (
    ForwardBatch,
    ForwardResult,
    Sampling,
    SlotParameters,
)

GREEDY = Sampling(temperature=0.0)


def worker_config(path: Path, **fields) -> WorkerConfig:
    """A small worker in fp32."""
    defaults = {
        "rank": 0,
        "tp_size": 1,
        "pp_size": 1,
        "device_index": None,
        "model_path": str(path),
        "trust_remote_code": False,
        "rope_scaling": None,
        "device": "cpu",
        "dtype": "float32",
        "attention": "auto",
        "instruction_set": "auto",
        "use_groups": True,
        "linear": "auto",
        "quantization": None,
        "kv_cache_dtype": "auto",
        "deterministic": None,
        "load_format": "auto",
        "page_size": 16,
        "num_pages": 64,
        "num_slots": 8,
        "max_seqs_per_forward": 8,
        "max_tokens_per_forward": 256,
        "max_request_tokens": 256,
        "max_topk_logprobs": 5,
        "torch_compile": False,
        "torch_compile_config": None,
        "cudagraph_sizes": (),
        "cudagraph_max_tokens": 256,
        "async_tp_threshold": None,
        "num_threads": None,
    }
    chosen = {**defaults, **fields}
    pages = chosen["num_pages"]
    return WorkerConfig(**{"least_pages": pages, "most_pages": pages, **chosen})


@dataclass
class Enter:
    """A sequence that starts, or continues with the next chunk of its prompt.

    ``forks`` are the slots that continue from its end too.
    """

    slot: int
    ids: list[int]
    start: int = 0
    ends_prompt: bool = True
    next_id: int = -1
    num_prompt_logprobs: int = -1
    forks: tuple[int, ...] = ()


@dataclass
class Driver:
    """Numbers the batches and assigns pages in a shuffled order."""

    worker: Worker
    config: WorkerConfig
    seed: int = 0
    number: int = 0
    lengths: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        order = np.random.default_rng(self.seed).permutation(self.config.num_pages)
        self.free = [int(page) for page in order]
        self.held: dict[int, list[int]] = {}
        self._parameters: list[tuple] = []

    def start(
        self,
        slot: int,
        sampling: Sampling = GREEDY,
        *,
        seed: int = 0,
        sample_index: int = 0,
        num_generated: int = 0,
        num_logprobs: int = -1,
    ) -> None:
        """Adds the slot's parameters to the next batch, and frees the slot's pages."""
        self.free.extend(self.held.pop(slot, []))
        self._parameters.append((slot, sampling, seed, sample_index, num_generated, num_logprobs))

    def step(self, decode: list[int] = (), prefill: list[Enter] = ()) -> ForwardResult:
        return self.submit(decode, prefill).collect()

    def submit(self, decode: list[int] = (), prefill: list[Enter] = ()) -> Pending:
        batch = self.batch(decode, prefill)
        self.number += 1
        return self.worker.submit(batch)

    def control(self, action: DeviceAction) -> ControlDone:
        control = Control(self.number, action)
        self.number += 1
        return self.worker.submit(control).collect()

    def batch(self, decode: list[int] = (), prefill: list[Enter] = ()) -> ForwardBatch:
        table: list[tuple[int, int, int]] = []
        for slot in decode:
            self._grow(slot, self.lengths[slot] + 1, table)
        for chunk in prefill:
            self._grow(chunk.slot, chunk.start + len(chunk.ids), table)
        copies = [copy for chunk in prefill for copy in self._fork(chunk, table)]
        sources, targets = np.array(copies, np.int32).reshape(-1, 2).T
        slots, columns, pages = np.array(table, np.int32).reshape(-1, 3).T
        return ForwardBatch(
            number=self.number,
            parameters=self._take_parameters(),
            table_slots=slots.copy(),
            table_columns=columns.copy(),
            table_pages=pages.copy(),
            decode_slots=_ints(decode),
            prefill_slots=_ints(chunk.slot for chunk in prefill),
            prefill_starts=_ints(chunk.start for chunk in prefill),
            prefill_lengths=_ints(len(chunk.ids) for chunk in prefill),
            prefill_ids=_ints(token for chunk in prefill for token in chunk.ids),
            prefill_num_logprobs=_ints(chunk.num_prompt_logprobs for chunk in prefill),
            prefill_next_ids=_ints(chunk.next_id for chunk in prefill),
            draw_chunks=_ints(
                index
                for index, chunk in enumerate(prefill)
                for _ in range(chunk.ends_prompt + len(chunk.forks))
            ),
            draw_slots=_ints(
                slot
                for chunk in prefill
                for slot in ([chunk.slot] * chunk.ends_prompt + list(chunk.forks))
            ),
            copy_sources=sources.copy(),
            copy_targets=targets.copy(),
        )

    def chunks(
        self, slot: int, ids: list[int], size: int, num_prompt_logprobs: int = -1
    ) -> list[Enter]:
        """A prompt cut into chunks."""
        return [
            Enter(
                slot,
                ids[start : start + size],
                start,
                start + size >= len(ids),
                ids[start + size] if start + size < len(ids) else -1,
                num_prompt_logprobs,
            )
            for start in range(0, len(ids), size)
        ]

    def _fork(self, chunk: Enter, table: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
        """Forks share the full pages and get a copy of a partly filled last page."""
        copies = []
        pages, size = self.held[chunk.slot], self.config.page_size
        length = chunk.start + len(chunk.ids)
        for slot in chunk.forks:
            own = pages[: length // size]
            if length % size:
                own = [*own, self.free.pop()]
                copies.append((pages[length // size], own[-1]))
            table += [(slot, column, page) for column, page in enumerate(own)]
            self.held[slot] = own
            self.lengths[slot] = length
        return copies

    def _grow(self, slot: int, length: int, table: list[tuple[int, int, int]]) -> None:
        pages = self.held.setdefault(slot, [])
        while len(pages) * self.config.page_size < length:
            table.append((slot, len(pages), self.free[0]))
            pages.append(self.free.pop(0))
        self.lengths[slot] = length

    def _take_parameters(self) -> SlotParameters | None:
        if not self._parameters:
            return None
        slots, samplings, seeds, indices, generated, logprobs = zip(*self._parameters, strict=True)
        self._parameters = []
        return SlotParameters(
            slots=_ints(slots),
            samplings=samplings,
            sampling_index=np.arange(len(slots), dtype=np.int32),
            seed=np.array(seeds, np.int64),
            sample_index=_ints(indices),
            num_generated=_ints(generated),
            num_logprobs=_ints(logprobs),
        )


def make_driver(path: Path, **fields) -> Driver:
    config = worker_config(path, **fields)
    return Driver(Worker(config), config)


def generate(
    driver: Driver,
    prompt: list[int],
    num_tokens: int,
    *,
    slot: int = 0,
    chunk: int = 10**9,
    **start,
) -> tuple[list[int], list[float]]:
    """Runs one sequence alone, with chunked prefill. Returns its token ids and their logprobs."""
    driver.start(slot, **{"num_logprobs": 0, **start})
    for part in driver.chunks(slot, prompt, chunk):
        result = driver.step(prefill=[part])
    ids, logprobs = [int(result.token_ids[0])], [float(result.logprobs[0])]
    for _ in range(num_tokens - 1):
        result = driver.step(decode=[slot])
        ids.append(int(result.token_ids[0]))
        logprobs.append(float(result.logprobs[0]))
    return ids, logprobs


def _ints(values) -> np.ndarray:
    return np.array(list(values), np.int32)
