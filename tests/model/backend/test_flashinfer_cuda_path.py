"""The worker's steps on CUDA with FlashInfer: what it is given is where it looks for it.

There is no CUDA here: ``fake_cuda`` has tensors without numbers, and a stand-in refuses what is on
the wrong device. Index arrays of plans are on the host, and all else is on the device.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import flashinfer_stand_in as stand_in
import numpy as np
import pytest
import torch
from attention_batches import make_cache, random_world
from fake_cuda import DEVICE, FakeCuda
from rows import named
from torch._subclasses.fake_tensor import unset_fake_temporarily
from worker_driver import worker_config
from worker_script import load_vocabulary, script

from tokasaurus.model.backend.base import HeadNorms, Rotation
from tokasaurus.model.backend.flashinfer import backend as module
from tokasaurus.model.backend.flashinfer import wrappers
from tokasaurus.model.backend.flashinfer.backend import FlashInferBackend
from tokasaurus.model.upload import pinned
from tokasaurus.model.worker.worker import Worker

pytestmark = pytest.mark.skipif(torch.backends.cuda.is_built(), reason="needs torch without CUDA")


@pytest.fixture
def cuda(monkeypatch):
    """A device for FlashInfer, on which Triton does not run."""
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    monkeypatch.setattr(module, "_why_not", lambda: None)
    monkeypatch.setattr(module, "_why_not_built", lambda _: None)
    monkeypatch.setattr(module, "_lacks_triton", lambda _: True)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))

    def pinned_numbers(arrays, device):
        assert device == DEVICE
        with unset_fake_temporarily():
            return pinned(arrays, torch.device("cpu"))

    monkeypatch.setattr(wrappers, "pinned", pinned_numbers)
    return FakeCuda(monkeypatch)


def test_everything_that_a_batch_can_ask_for_stays_where_it_is(cuda, checkpoint):
    config = worker_config(
        checkpoint("qwen3", head_dim=64, num_heads=2, num_kv_heads=1),
        device="cuda",
        device_index=0,
        dtype="float16",
        attention="flashinfer",
        linear="plain",
        num_slots=12,
        num_pages=200,
    )
    batches = script(config)
    with cuda.there():
        worker = Worker(config, load_vocabulary)
        pending = []
        for batch in batches:
            with cuda.watched(), named(batch.number):
                pending.append(worker.submit(batch))
            if len(pending) == 2:
                pending.pop(0).collect()
    assert set(cuda.waits) == {"EventClock.wait", "Download.array", "PlannedWrapper.plan"}


def test_groups_stay_where_they_are(cuda):
    num_levels = 0
    for seed in range(6):
        _, grouped, _ = random_world(np.random.default_rng(seed), 16)
        with cuda.there(), cuda.watched(), named(seed):
            cache = make_cache(grouped.page_table.numel(), 16, 2, 64, torch.float16, device=DEVICE)
            table = torch.empty(grouped.page_table.shape, dtype=torch.int32, device=DEVICE)
            attention = FlashInferBackend(cache, 4).plan(replace(grouped, page_table=table))
            num_levels += len(attention._levels)
            num_rows = len(grouped.positions)
            heads = torch.empty(num_rows, 8, 64, dtype=torch.float16, device=DEVICE)
            rotation = Rotation(*torch.empty(2, num_rows, 1, 32, device=DEVICE))
            norms = HeadNorms(*torch.empty(2, 64, dtype=torch.float16, device=DEVICE), 1e-5)
            output = attention.attend(0, heads, rotation, norms)
            assert (output.shape, output.device) == ((num_rows, 256), DEVICE)
    assert num_levels > 5
    assert set(cuda.waits) == {"PlannedWrapper.plan"}


def test_the_stand_in_refuses_arrays_on_the_wrong_device(cuda):
    host = [torch.tensor(each, dtype=torch.int32) for each in ([0, 1], [0], [5], [5])]
    with cuda.there():
        workspace = torch.zeros(8, dtype=torch.uint8, device=DEVICE)
        wrapper = stand_in.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_tensor_cores=True, backend="fa2"
        )
        there = [torch.zeros(each.shape, dtype=torch.int32, device=DEVICE) for each in host]
        options = {"q_data_type": torch.float16, "kv_data_type": torch.float16, "sm_scale": 0.1}

        def plan(page_starts, pages, last_page_lengths, lengths):
            wrapper.plan(
                page_starts, pages, last_page_lengths, 2, 1, 64, 16, seq_lens=lengths, **options
            )

        plan(host[0], there[1], host[2], host[3])
        for arrays, reason in (
            ((there[0], there[1], host[2], host[3]), "page starts is on cuda:0, not on cpu"),
            ((host[0], host[1], host[2], host[3]), "pages is on cpu, not on cuda:0"),
            ((host[0], there[1], host[2], there[3]), "lengths is on cuda:0, not on cpu"),
        ):
            with named(reason), pytest.raises(ValueError, match=reason):
                plan(*arrays)
