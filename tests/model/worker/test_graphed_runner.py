"""Decodes that run as graphs get the tokens that they get without.

There is no CUDA here: ``graph_stand_ins`` records operators and repeats them on the same memory.
"""

from __future__ import annotations

import contextlib
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import VOCAB_SIZE
from graph_stand_ins import PaddedBackend, RecordingGraphs, RepeatingGraphs, add_graphs
from rows import named
from worker_driver import Enter, generate, make_driver

from tokasaurus.errors import EngineError
from tokasaurus.model.backend.base import SequenceRows
from tokasaurus.model.facts import read_model_config
from tokasaurus.model.kv_cache import KVCache
from tokasaurus.model.placement import Placement
from tokasaurus.model.weights.loader import load_model
from tokasaurus.model.worker import device_graphs, loading
from tokasaurus.model.worker.graphed_runner import graphed
from tokasaurus.model.worker.runner import EagerRunner
from tokasaurus.model.worker.slot_state import PlannedBatch
from tokasaurus.protocol.commands import ReleaseMemory, RestoreMemory
from tokasaurus.protocol.messages import Sampling

SIZES = (2, 4, 6)
SAMPLINGS = (
    Sampling(temperature=0.0),
    Sampling(temperature=0.9),
    Sampling(temperature=0.7, top_k=20, top_p=0.9),
)


@pytest.fixture(autouse=True)
def padded(monkeypatch):
    monkeypatch.setattr(loading, "choose_backend", lambda *_: PaddedBackend)


def make_graphed(path, sizes=SIZES, max_tokens=1 << 20, new_graphs=None, **fields):
    # The kernels of packed products are not torch's operators, so they cannot be recorded.
    driver = make_driver(path, linear="plain", **fields)
    graphs = add_graphs(driver.worker, sizes, max_tokens, new_graphs)
    driver.worker.warm_up()
    return driver, graphs


def schedule(seed, num_steps=40):
    """Prompts in chunks of slots that begin, and decodes of some that run, in a random order."""
    source = random.Random(seed)
    running: list[int] = []
    for _ in range(num_steps):
        starting = []
        if source.random() < 0.3:
            free = [slot for slot in range(8) if slot not in running]
            starting = source.sample(free, min(len(free), source.randint(1, 3)))
        decoding = source.sample(running, source.randint(0, len(running)))
        prompts = [
            [source.randrange(VOCAB_SIZE) for _ in range(source.randint(1, 40))] for _ in starting
        ]
        yield decoding, dict(zip(starting, prompts, strict=True)), source.randrange(len(SAMPLINGS))
        running += starting
        for slot in running[:]:
            if source.random() < 0.05:
                running.remove(slot)


def run_schedule(driver, seed):
    results = []
    for decoding, prompts, sampling in schedule(seed):
        for slot in prompts:
            driver.start(slot, SAMPLINGS[sampling], seed=seed, sample_index=slot, num_logprobs=0)
        result = driver.step(decode=decoding, prefill=[Enter(*each) for each in prompts.items()])
        results.append((result.token_ids.tolist(), result.logprobs))
    return results


def check_schedules(plain, graphed, seeds):
    for seed in seeds:
        with named(seed):
            pairs = zip(run_schedule(plain, seed), run_schedule(graphed, seed), strict=True)
            for (expected, expected_logprobs), (tokens, logprobs) in pairs:
                assert tokens == expected
                np.testing.assert_allclose(logprobs, expected_logprobs, atol=2e-4)


def test_random_schedules_draw_the_tokens_that_they_draw_without_graphs(checkpoint):
    for architecture in ("llama", "qwen3"):
        path = checkpoint(architecture)
        graphed, graphs = make_graphed(path)
        with named(architecture):
            check_schedules(make_driver(path), graphed, range(4))
            assert graphs.recorded == [6, 4, 2]  # and none after the warm-up
            assert set(graphs.replayed) == {2, 4, 6}
            assert len(graphs.replayed) > 30


def test_layers_of_torch_compile_are_recorded_after_they_are_compiled(checkpoint):
    """With torch's backend that traces but compiles nothing, which takes seconds."""
    path = checkpoint("llama")
    tracing = json.dumps({"backend": "eager"})
    graphed, graphs = make_graphed(
        path, new_graphs=RepeatingGraphs, torch_compile=True, torch_compile_config=tracing
    )
    check_schedules(make_driver(path), graphed, [1])
    assert graphs.replayed
    assert graphed.worker._runner.num_recompiles == 0


def test_rows_without_a_sequence_change_nothing_in_the_cache(checkpoint):
    driver, graphs = make_graphed(checkpoint("llama"), sizes=(8,))
    caches = driver.worker._cache.keys + driver.worker._cache.values
    for slot in range(3):
        driver.start(slot)
    driver.step(prefill=[Enter(slot, [5 + slot] * 20) for slot in range(3)])
    before = [tensor.clone() for tensor in caches]
    driver.step(decode=[2, 0, 1])
    assert graphs.replayed == [8]
    written = {(driver.held[slot][1], 20 % 16) for slot in range(3)}
    for tensor, old in zip(caches, before, strict=True):
        different = (tensor.view(torch.int32) != old.view(torch.int32)).any(dim=(1, 3))
        assert set(map(tuple, different.nonzero().tolist())) == written


def test_a_batch_with_a_prompt_many_rows_or_a_long_sequence_runs_as_usual(checkpoint):
    driver, graphs = make_graphed(checkpoint("llama"), sizes=(2,), max_tokens=32)
    for slot, length in enumerate((31, 5, 5, 5)):
        driver.start(slot)
        driver.step(prefill=[Enter(slot, [7] * length)])
    for decode, prefill, is_graph in (
        ([0], [], True),
        ([1, 2], [], True),
        ([1, 2, 3], [], False),
        ([0], [], False),  # 33 tokens
        ([1], [Enter(4, [8])], False),
        ([], [Enter(5, [8])], False),
        ([], [], False),
    ):
        for chunk in prefill:
            driver.start(chunk.slot)
        before = len(graphs.replayed)
        driver.step(decode=decode, prefill=prefill)
        with named((decode, prefill)):
            assert len(graphs.replayed) - before == is_graph


def test_graphs_are_recorded_again_after_memory_was_restored(checkpoint):
    path = checkpoint("llama")
    expected, _ = generate(make_driver(path), [5, 6, 7], 4)
    driver, graphs = make_graphed(path)
    assert generate(driver, [5, 6, 7], 4)[0] == expected
    driver.control(ReleaseMemory(weights=True, kv_cache=True))
    driver.control(RestoreMemory(weights=True, kv_cache=True))
    assert driver.worker._runner._recorded == []
    assert generate(driver, [5, 6, 7], 4)[0] == expected
    assert graphs.recorded == [6, 4, 2, 6, 4, 2]


def test_a_failure_to_record_names_the_flag(checkpoint, monkeypatch):
    monkeypatch.setattr(RecordingGraphs, "record", lambda *_: torch.zeros(1)[2])
    with pytest.raises(EngineError, match="cannot run as CUDA graphs"):
        make_graphed(checkpoint("llama"))


def test_the_recorder_finds_what_a_graph_must_not_do():
    inside = torch.ones(3)

    def reads_memory_of_a_batch():
        return inside + torch.from_numpy(np.ones(3, np.float32))

    graph, _ = RecordingGraphs().record(reads_memory_of_a_batch)
    with pytest.raises(AssertionError, match="memory that was freed"):
        graph.replay()
    with pytest.raises(AssertionError, match="waits for the device"):
        RecordingGraphs().record(lambda: inside * inside[0].item())
    with pytest.raises(AssertionError, match="waits for the device"):
        RecordingGraphs().record(lambda: inside[inside > 0])


def test_stages_of_a_pipeline_run_as_graphs_one_after_the_other(checkpoint):
    """A later stage changes its inputs, and what an earlier one returns is still on its way."""
    path = checkpoint("llama")
    config = read_model_config(path)
    place = Placement(torch.float32, torch.device("cpu"), "plain")
    table = torch.arange(8, dtype=torch.int32).view(4, 2)
    runners, caches = [], []
    for stage in (range(1), range(1, config.num_layers), None):
        model, _, _ = load_model(path, config, place, stage=stage)
        cache = KVCache.allocate(
            num_layers=len(model.layers),
            num_pages=8,
            page_size=16,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        for tensor in cache.keys + cache.values:
            tensor.zero_()
        backend = PaddedBackend(cache, config.num_heads)
        runner = EagerRunner(model, backend)
        arguments = config.hidden_size, torch.float32, table, SIZES, 32
        if stage is not None:
            runner = graphed(runner, backend, model, *arguments, RecordingGraphs)
        runner.warmed_up()
        runners.append(runner)
        caches.append(cache)
    first, second, whole = runners
    expected, found = [], []
    with torch.inference_mode():
        for step in range(3):
            batch = decodes(table, np.array([[3, 1, 0], [2, 3], [0, 2, 1, 3]][step]), step + 1)
            expected.append(whole.run(batch).clone())
            between = first.run(batch)
            kept = between.clone()
            found.append(second.run(replace(batch, inputs=between)).clone())
            first.run(replace(batch, inputs=batch.inputs + 1))
            assert torch.equal(between, kept)
            first.run(batch)  # writes the keys that the next step reads
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def decodes(table, slots, length):
    """Each sequence's row at the same position, all positions before which are zeros."""
    count, lengths = len(slots), np.full(len(slots), length, np.int32)
    rows = SequenceRows(
        slots.astype(np.int32), np.arange(count + 1), lengths, lengths - 1, table, count
    )
    inputs, positions = torch.from_numpy(slots) + 5, torch.full((count,), length - 1)
    return PlannedBatch(inputs, positions, rows, None, None, None, None, None)


def test_what_could_not_be_recorded_is_said(monkeypatch):
    """torch says that the recording cannot be ended, and not why."""

    @contextlib.contextmanager
    def record(*_, **__):
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    class Stream:
        device = "cuda"

        def wait_stream(self, _): ...

    monkeypatch.setattr(device_graphs, "_stream_of", lambda _: Stream())
    for name, stand_in in (
        ("graph", record),
        ("graph_pool_handle", lambda: None),
        ("CUDAGraph", lambda: None),
        ("stream", lambda _: contextlib.nullcontext()),
        ("current_stream", lambda _: Stream()),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    numbers = iter((None, ValueError("a number was asked for")))

    def work():
        if (error := next(numbers)) is not None:
            raise error

    with pytest.raises(ValueError, match="a number was asked for"):
        device_graphs.CudaGraphs(torch.device("cuda")).record(work)
