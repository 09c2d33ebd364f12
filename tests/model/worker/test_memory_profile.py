"""The KV cache gets what a device has left beside what was measured; the device is simulated."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from worker_driver import Driver, Enter, worker_config

from tokasaurus.errors import ConfigError
from tokasaurus.model.worker import worker as worker_module
from tokasaurus.model.worker.memory_profile import MeasuredMemory, trial_pages
from tokasaurus.model.worker.slot_state import HISTORY_BYTES
from tokasaurus.model.worker.worker import Worker

GIB = 1 << 30


@dataclass
class SimulatedMemory:
    """Says what a device with so much memory would, where each batch holds ``batch_bytes``.

    Attributes:
        total_bytes: of the device.
        taken_bytes: by weights, libraries and others.
        batch_bytes: of the largest batch.
        graph_bytes: of recorded graphs.
        runs_out: the largest batch does not fit.
    """

    total_bytes: int
    taken_bytes: int
    batch_bytes: int
    graph_bytes: int = 0
    runs_out: bool = False
    worker: Worker | None = None
    is_measuring: bool = False
    has_graphs: bool = False

    def total(self) -> int:
        return self.total_bytes

    def free(self) -> int:
        return self.total_bytes - self.held() - self.has_graphs * self.graph_bytes

    def held(self) -> int:
        return self.taken_bytes + self._cache_bytes

    def peak(self) -> int:
        assert self.is_measuring
        return self.held() + self.batch_bytes

    def reset_peak(self) -> None:
        self.is_measuring = True

    def give_back(self) -> None:
        """All of it is given back at once."""

    @property
    def _cache_bytes(self) -> int:
        return self.worker._cache.num_bytes


def make_worker(memory, checkpoint, monkeypatch, **fields):
    config = worker_config(checkpoint, max_tokens_per_forward=64, **fields)
    monkeypatch.setattr(worker_module, "open_device_memory", lambda device: memory)
    memory.worker = worker = Worker(config)
    warmed_up = worker._runner.warmed_up

    def record():
        memory.has_graphs = True
        warmed_up()

    monkeypatch.setattr(worker._runner, "warmed_up", record)
    if memory.runs_out:

        def run(*_):
            raise torch.OutOfMemoryError("no room for 4 bytes")

        monkeypatch.setattr(worker, "_enqueue", run)
    return worker, config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama")


def resized(worker, monkeypatch):
    """A list that the sizes of a cache go to, in the place of memory that is not there."""
    counts = []
    monkeypatch.setattr("tokasaurus.model.kv_cache.KVCache.resize", lambda _, n: counts.append(n))
    monkeypatch.setattr(worker._state, "set_num_pages", counts.append)
    return counts


def test_the_cache_gets_what_is_left(checkpoint, monkeypatch):
    for attention in ("reference", "auto"):
        memory = SimulatedMemory(11 * GIB, 3 * GIB, GIB, graph_bytes=GIB)
        flags = {"least_pages": 16, "most_pages": 10**9, "attention": attention}
        worker, config = make_worker(memory, checkpoint, monkeypatch, **flags)
        counts = resized(worker, monkeypatch)
        worker._fit_kv_cache(memory)
        cache = worker._cache
        page = cache.num_bytes // cache.num_pages + 16 * HISTORY_BYTES
        attention_bytes = worker._backend.workspace_bytes(64, config.max_request_tokens)
        assert attention_bytes > page
        left = 6 * GIB - attention_bytes - (512 << 20)
        assert worker.num_pages == left // page
        assert counts == [left // page] * 2


def test_all_ranks_take_the_smallest_cache_and_refuse_together(checkpoint, monkeypatch):
    memory = SimulatedMemory(10 * GIB, 3 * GIB, GIB)
    flags = {"least_pages": 16, "most_pages": 10**9}
    worker, _ = make_worker(memory, checkpoint, monkeypatch, **flags)
    counts = resized(worker, monkeypatch)
    # Another rank has room for 1,234 pages.
    monkeypatch.setattr(worker.ranks, "largest", lambda value: max(value, -1234))
    worker._fit_kv_cache(memory)
    assert counts == [1234] * 2
    worker, _ = make_worker(memory, checkpoint, monkeypatch, **flags)
    monkeypatch.setattr(worker.ranks, "agreed", lambda reason: reason or "the other has no room")
    with pytest.raises(ConfigError, match="the other has no room"):
        worker._fit_kv_cache(memory)


def test_a_worker_runs_with_the_pages_that_it_has_measured(checkpoint, monkeypatch):
    """As many as a request needs, or more, up to the most; and it generates the same tokens."""
    expected = generate(*plain_worker(checkpoint))
    for most, attention in ((200, "auto"), (200, "reference"), (16, "auto")):
        memory = SimulatedMemory(10 * GIB, 3 * GIB, GIB)
        flags = {"least_pages": 16, "most_pages": most, "attention": attention}
        worker, config = make_worker(memory, checkpoint, monkeypatch, **flags)
        assert worker.num_pages == trial_pages(config) == 5
        worker.warm_up()
        assert worker.num_pages == worker._cache.num_pages == most
        assert worker._state.adjustments._history.num_bytes >= HISTORY_BYTES * most * 16
        tokens = generate(worker, replace(config, num_pages=worker.num_pages))
        assert tokens == expected, attention
        monkeypatch.undo()


def plain_worker(checkpoint):
    config = worker_config(checkpoint, max_tokens_per_forward=64, num_pages=16)
    worker = Worker(config)
    worker.warm_up()
    return worker, config


def generate(worker, config):
    """Greedy tokens behind a prompt, in pages all over the cache."""
    driver = Driver(worker, config)
    driver.start(3)
    tokens = driver.step(prefill=[Enter(3, list(range(5, 45)))]).token_ids.tolist()
    for _ in range(40):
        tokens += driver.step(decode=[3]).token_ids.tolist()
    return tokens


def test_flags_that_do_not_fit_are_refused_with_the_arithmetic(checkpoint, monkeypatch):
    flags = {"num_pages": 2**20, "least_pages": 2**20, "most_pages": 2**20}
    memory = SimulatedMemory(4 * GIB, 3 * GIB, GIB // 4)
    worker, _ = make_worker(memory, checkpoint, monkeypatch, **flags)
    with pytest.raises(ConfigError) as raised:
        worker.warm_up()
    message = str(raised.value)
    for part in (
        "the KV cache needs 16777216 tokens, ",
        "of 4.3 GB, 3.2 GB are taken by weights, tables, libraries and other processes",
        "268.4 MB by the largest batch, 0 bytes by graphs",
        "536.9 MB stay free",
        "with kv_cache_num_tokens=auto fits",
        "a lower max_tokens_per_forward, which is 64,",
    ):
        assert part in message, message
    # The number that the message names does fit.
    fitting = int(message.partition("max_num_tokens_per_request=")[2].split()[0])
    pages = fitting // 16
    flags = {"num_pages": 64, "least_pages": pages, "most_pages": pages}
    worker, _ = make_worker(memory, checkpoint, monkeypatch, **flags)
    counts = resized(worker, monkeypatch)
    worker._fit_kv_cache(memory)
    assert counts == [pages] * 2


def test_a_batch_that_runs_out_of_memory_is_refused(checkpoint, monkeypatch):
    memory = SimulatedMemory(4 * GIB, 3 * GIB, GIB, runs_out=True)
    worker, _ = make_worker(memory, checkpoint, monkeypatch)
    with pytest.raises(ConfigError, match="max_tokens_per_forward=64: the largest batch does not"):
        worker.warm_up()


def test_all_parts_and_the_cache_add_up_to_the_device():
    rng = np.random.default_rng(0)
    for _ in range(200):
        total = int(rng.integers(1, 200)) * GIB
        parts = [int(rng.integers(0, total // 4)) for _ in range(4)]
        measured = MeasuredMemory(total, *parts, token=int(rng.integers(1, 1 << 20)))
        page_size = int(rng.integers(1, 65))
        used = sum(parts) + measured.reserve
        page = page_size * measured.token
        pages = measured.pages(page_size)
        assert measured.reserve >= 0.03 * total - 1
        if used > total:
            assert pages == 0
        else:
            assert used + pages * page <= total < used + (pages + 1) * page
