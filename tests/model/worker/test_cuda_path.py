"""What the worker does on CUDA: operands are on the device, and the host waits only where it may.

There is no CUDA here: ``fake_cuda`` has tensors without numbers. docs/cuda.md lists the waits.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_cuda import DEVICE, FakeCuda
from rows import named
from worker_driver import Driver, Enter, worker_config
from worker_script import load_vocabulary, script

import tokasaurus.model
from tokasaurus.model.download import Download
from tokasaurus.model.upload import Staging
from tokasaurus.model.worker.worker import Worker
from tokasaurus.protocol.commands import ReleaseMemory, RestoreMemory
from tokasaurus.protocol.messages import LogprobsMode, Sampling

pytestmark = pytest.mark.skipif(torch.backends.cuda.is_built(), reason="needs torch without CUDA")

DOCS = Path(__file__).parents[3] / "docs" / "cuda.md"
MODEL_ROOM = Path(tokasaurus.model.__path__[0])


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def make_config(path, **fields):
    defaults = {"attention": "reference", "linear": "plain", "num_slots": 12, "num_pages": 200}
    return worker_config(path, device="cuda", device_index=0, **{**defaults, **fields})


def test_everything_that_a_batch_can_ask_for_stays_on_the_device(cuda, checkpoint):
    """Chunks, forks, penalties, grammars, prompt logprobs and pooling, two batches in flight."""
    config = make_config(checkpoint("qwen3", tied=True))
    batches = script(config)
    with cuda.there():
        worker = Worker(config, load_vocabulary)
        pending = []
        for batch in batches:
            with cuda.watched(), named(batch.number):
                pending.append(worker.submit(batch))
            if len(pending) == 2:
                pending.pop(0).collect()
    assert set(cuda.waits) == {"EventClock.wait", "Download.array"}


def test_every_way_to_sample_stays_on_the_device(cuda, checkpoint):
    config = make_config(checkpoint("llama"))
    ways = [
        Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, logprobs_mode=mode)
        for temperature, top_k, top_p, min_p in (
            (0.0, 0, 1.0, 0.0),
            (0.7, 0, 1.0, 0.1),
            (0.7, 2, 1.0, 0.0),
            (0.7, 200, 0.9, 0.0),
            (1.0, 0, 0.9, 0.2),
        )
        for mode in LogprobsMode
    ]
    with cuda.there():
        driver = Driver(Worker(config), config)
        for way in ways:
            for slot in range(3):
                driver.start(slot, way, num_logprobs=slot)
            with cuda.watched(), named(way):
                driver.submit(prefill=[Enter(slot, [5, 6, 7]) for slot in range(3)])
                driver.submit(decode=[2, 0])
                driver.submit(decode=[2, 0])
    assert cuda.waits == []


def test_controls_wait_for_the_device_before_and_after(cuda, checkpoint):
    config = make_config(checkpoint("llama"))
    with cuda.there():
        driver = Driver(Worker(config), config)
        for action in (
            ReleaseMemory(weights=True, kv_cache=True),
            RestoreMemory(weights=True, kv_cache=True),
        ):
            assert driver.control(action).error is None
    assert cuda.waits == ["wait_for_device"] * 4


def test_the_places_where_the_host_waits_are_those_of_the_documentation():
    """All that call ``synchronize``. What asks for a number on the device fails above."""
    listed = set(re.findall(r"^\| `([\w.]+)` \|", DOCS.read_text(), re.MULTILINE))
    found = set()
    for path in MODEL_ROOM.rglob("*.py"):
        found |= {
            name
            for name, call in _calls(ast.parse(path.read_text()))
            if isinstance(call.func, ast.Attribute) and call.func.attr == "synchronize"
        }
    assert found == listed


def _calls(node, name=""):
    """Each call, and the function that it is in."""
    for child in ast.iter_child_nodes(node):
        inner = name
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            inner = f"{name}.{child.name}".lstrip(".")
        if isinstance(child, ast.Call):
            yield name, child
        yield from _calls(child, inner)


MISTAKES = {
    "a number of the device": lambda x: x[0].item(),
    "a list of its numbers": lambda x: x.tolist(),
    "a condition": lambda x: bool((x > 0).all()),
    "a mask": lambda x: x[x > 0],
    "the places of a mask": lambda x: (x > 0).nonzero(),
    "a copy to the host": lambda x: x.cpu(),
    "a copy to the device": lambda x: torch.zeros(3).to(DEVICE),
    "a copy into a tensor of the device": lambda x: x.copy_(torch.zeros(3)),
    "an operand on the host": lambda x: x + torch.zeros(3),
    "an index on the host": lambda x: x.index_select(0, torch.zeros(2, dtype=torch.int64)),
}


def test_mistakes_are_found(cuda):
    with cuda.there():
        staging = Staging(DEVICE)
        staged = staging.add(np.zeros(3, np.float32))
        staging.send()
        for name, mistake in MISTAKES.items():
            with named(name), cuda.watched(), pytest.raises((RuntimeError, AssertionError)):
                mistake(staged.tensor)
        Download(staged.tensor).array()
    assert cuda.waits == ["Download.array"]
