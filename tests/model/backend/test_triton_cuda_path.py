"""The worker's steps on CUDA with Triton's kernels: all that they are given is on the device.

There is no CUDA here: ``fake_cuda`` has tensors without numbers, and kernels are not run.
"""

from __future__ import annotations

import collections
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from checkpoints import VOCAB_SIZE
from fake_cuda import DEVICE, FakeCuda
from rows import named
from torch import Tensor
from worker_driver import Driver, Enter, worker_config
from worker_script import load_vocabulary, script

from tokasaurus.model.backend.triton.backend import is_interpreted
from tokasaurus.model.worker import runners
from tokasaurus.model.worker.worker import Worker
from tokasaurus.protocol.messages import Sampling

pytestmark = pytest.mark.triton

UNSPECIALIZED = collections.defaultdict(
    tuple,
    prepare_heads=("num_rows", "page_table_stride"),
    attend_task=("page_table_stride",),
    mask_row=("bits_stride",),
)
"""Arguments that kernels are not compiled for: ``do_not_specialize`` of each."""


class Graphs:
    """Implements ``DeviceGraphs``: without numbers there is nothing to repeat."""

    num_replays = 0

    def record(self, work):
        work()
        return self, work()

    def replay(self):
        Graphs.num_replays += 1


def _kind(unspecialized, name, value):
    """What a kernel is compiled for of an argument, apart from a tensor's address."""
    if isinstance(value, Tensor):
        return value.dtype
    if isinstance(value, int) and name not in unspecialized:
        return "1" if value == 1 else f"int, {value % 16 == 0}"
    return type(value)


@pytest.fixture
def cuda(monkeypatch):
    """Notes the kernels that are launched, and what they would be compiled for."""
    from triton.runtime import interpreter

    assert is_interpreted(), "these tests need TRITON_INTERPRET=1: run `make test-cuda`"
    cuda = FakeCuda(monkeypatch)
    cuda.launched = set()
    cuda.compiled = set()

    def launch(kernel, *args, **kwargs):
        name = kernel.fn.__name__
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                assert value.device == DEVICE, f"{name} gets {value}"
        cuda.launched.add(name)
        numbers = zip(kernel.arg_names, args, strict=False)
        kinds = tuple(_kind(UNSPECIALIZED[name], *number) for number in numbers)
        cuda.compiled.add((name, kinds, tuple(sorted(kwargs.items()))))

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(runners, "CudaGraphs", lambda _: Graphs())
    return cuda


def make_worker(path, load_vocabulary=load_vocabulary, **fields):
    config = worker_config(
        path,
        device="cuda",
        device_index=0,
        attention="triton",
        linear="plain",
        num_slots=12,
        num_pages=200,
        **fields,
    )
    return Worker(config, load_vocabulary), config


def test_everything_that_a_batch_can_ask_for_stays_on_the_device(cuda, checkpoint):
    path = checkpoint("qwen3", tied=True)
    with cuda.there():
        worker, config = make_worker(path)
    batches = script(config)
    with cuda.there():
        pending = []
        for batch in batches:
            with cuda.watched(), named(batch.number):
                pending.append(worker.submit(batch))
            if len(pending) == 2:
                pending.pop(0).collect()
    assert set(cuda.waits) == {"EventClock.wait", "Download.array"}
    assert cuda.launched >= {
        "prepare_heads",
        "attend_task",
        "draw_token",
        "mask_row",
        "sum_row",
        "rms_norm",
    }


def test_no_batch_compiles_a_kernel_after_the_warm_up(cuda, checkpoint):
    """In bf16, which adjustments widen: so each kernel of sampling is compiled for two dtypes."""
    for vocab_size in (VOCAB_SIZE, 500):
        path = checkpoint("qwen3", tied=True, vocab_size=vocab_size)
        with cuda.there():
            vocabulary = partial(load_vocabulary, vocab_size)
            worker, config = make_worker(path, vocabulary, dtype="bfloat16")
            worker.warm_up()
        before, cuda.compiled = cuda.compiled, set()
        batches = script(config)
        with cuda.there():
            for batch in batches:
                worker.submit(batch).collect()
        assert cuda.compiled <= before, (vocab_size, cuda.compiled - before)
        assert {name for name, *_ in cuda.compiled} >= {"draw_token", "mask_row", "sum_row"}


def test_graphs_are_recorded_and_replayed_without_waiting(cuda, checkpoint):
    path = checkpoint("llama")
    Graphs.num_replays = 0
    with cuda.there():
        worker, config = make_worker(path, cudagraph_sizes=(2, 4))
        driver = Driver(worker, config)
        with cuda.watched():
            worker._runner.warmed_up()
            for slot in range(3):
                driver.start(slot, Sampling(temperature=0.7, top_p=0.9))
            driver.submit(prefill=[Enter(slot, [5, 6, 7]) for slot in range(3)])
            for decode in ([0, 1], [2], [0, 1, 2], [0, 1, 2]):
                driver.submit(decode=decode)
    assert Graphs.num_replays == 4
    assert cuda.waits == []
