"""The worker's steps on CUDA with Triton's kernels: all that they are given is on the device.

There is no CUDA here: ``fake_cuda`` has tensors without numbers, and kernels are not run.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
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


class Graphs:
    """Implements ``DeviceGraphs``: without numbers there is nothing to repeat."""

    num_replays = 0

    def record(self, work):
        work()
        return self, work()

    def replay(self):
        Graphs.num_replays += 1


@pytest.fixture
def cuda(monkeypatch):
    """Notes the kernels that are launched."""
    from triton.runtime import interpreter

    assert is_interpreted(), "these tests need TRITON_INTERPRET=1: run `make test-cuda`"
    cuda = FakeCuda(monkeypatch)
    cuda.launched = set()

    def launch(kernel, *args, **kwargs):
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                assert value.device == DEVICE, f"{kernel.fn.__name__} gets {value}"
        cuda.launched.add(kernel.fn.__name__)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(runners, "CudaGraphs", lambda _: Graphs())
    return cuda


def make_worker(path, **fields):
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
