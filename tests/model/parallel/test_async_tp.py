"""Large batches whose products overlap with what ranks exchange, by torch's operators.

The operators themselves run on GPUs. Here their definitions take their places, as torch has them
for its own tests: the same calls with the same arguments, through gloo.
"""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from rows import named
from worker_driver import Driver, Enter, worker_config
from worker_script import ids, load_vocabulary

from tokasaurus.model.linear_methods.overlapped import OverlappedLinear
from tokasaurus.model.parallel import async_tp
from tokasaurus.model.worker.worker import Worker

# Neither size divides the rows of a batch.
MODELS = (
    ("llama", {"attention_bias": True, "mlp_bias": True}, 2),
    ("qwen3", {"tied": True}, 4),
    ("qwen2", {"num_heads": 8}, 4),
)
THRESHOLD = 20
_library = []


def define_operators():
    """Once in a process."""
    import torch.distributed._symmetric_memory as operators

    if not _library:
        _library.append(torch.library.Library("symm_mem", "IMPL", "CPU"))
        for name in ("fused_all_gather_matmul", "fused_matmul_reduce_scatter"):
            _library[0].impl(name, getattr(operators, f"_{name}_fallback"))


def results_of(meeting, path, threshold, fields):
    """Batches above the threshold and below it; and how many products overlapped in each."""
    define_operators()
    counts = []

    class Counting(async_tp.Overlap):
        def gather_multiply(self, own, weight):
            counts[-1] += 1
            assert len(own) == -(-self._num_rows // self._size)
            return super().gather_multiply(own, weight)

        def multiply_scatter(self, x, weight):
            counts[-1] += 1
            return super().multiply_scatter(x, weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(async_tp, "why_not", lambda *_: None)
        patch.setattr(async_tp, "Overlap", Counting)
        config = worker_config(
            path,
            rank=meeting.rank,
            tp_size=meeting.size,
            linear="plain",
            async_tp_threshold=threshold,
            **fields,
        )
        worker = Worker(config, load_vocabulary, meeting.rendezvous)
    driver = Driver(worker, config)
    results = []
    for slot, length in enumerate((37, 21, 20, 19)):
        driver.start(slot, num_logprobs=2)
        counts.append(0)
        prompt = Enter(slot, ids(length, slot), num_prompt_logprobs=3)
        results.append(driver.step(list(range(slot)), [prompt]))
    counts.append(0)
    results.append(driver.step([0, 1, 2, 3]))
    return results if worker.ranks.samples else None, counts


def check(ranks, path, size, **fields):
    plain = ranks.run(size, results_of, path, None, fields)
    overlapped = ranks.run(size, results_of, path, THRESHOLD, fields)
    # Four products in each of three layers, at every rank.
    assert [counts for _, counts in overlapped] == [[12, 12, 12, 12, 0]] * size
    assert [counts for _, counts in plain] == [[0, 0, 0, 0, 0]] * size
    for one, other in zip(overlapped[0][0], plain[0][0], strict=True):
        for name in ("token_ids", "top_ids", "prompt_top_ids"):
            assert getattr(one, name).tolist() == getattr(other, name).tolist(), name
        for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-4)


def test_products_that_overlap_give_what_others_give(checkpoint, ranks):
    for architecture, options, size in MODELS:
        with named(f"{architecture} {options}, {size} ranks"):
            check(ranks, checkpoint(architecture, **options), size)


def test_large_batches_overlap_beside_graphs_for_small_ones(checkpoint, ranks):
    traced = {"torch_compile": True, "torch_compile_config": '{"backend": "eager"}'}
    check(ranks, checkpoint("llama", tied=True), 2, **traced)


def refused(meeting, path):
    messages = []

    class Listener(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    listener = Listener()
    logging.getLogger("tokasaurus").addHandler(listener)
    config = worker_config(path, rank=meeting.rank, tp_size=2, async_tp_threshold=7)
    worker = Worker(config, rendezvous=meeting.rendezvous)
    logging.getLogger("tokasaurus").removeHandler(listener)
    overlapping = [each for each in worker._model.modules() if hasattr(each, "method")]
    assert not any(isinstance(each.method, OverlappedLinear) for each in overlapping)
    return [each for each in messages if "async_tp_threshold" in each]


def test_a_machine_without_symmetric_memory_says_so_and_goes_on(checkpoint, ranks):
    for messages in ranks.run(2, refused, checkpoint(tied=True)):
        (message,) = messages
        assert message == (
            "async_tp_threshold=7: there is no symmetric memory on device=cpu;"
            " products and what ranks exchange come one after the other"
        )


def test_only_gpus_that_reach_one_another_overlap(monkeypatch):
    joined = {(0, 1), (1, 0), (2, 3), (3, 2)}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *pair: pair in joined)
    cuda = [torch.device("cuda", index) for index in range(4)]
    for device in cuda:
        assert async_tp.why_not(device, "plain", 2) is None
    assert async_tp.why_not(cuda[1], "plain", 4) == "no NVLink joins the devices 0 and 2"
    assert async_tp.why_not(cuda[3], "plain", 8) == "the devices are not on one machine"
    assert "linear=packed" in async_tp.why_not(cuda[0], "packed", 2)
