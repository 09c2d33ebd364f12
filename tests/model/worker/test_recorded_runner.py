"""Recorded layers give, bit for bit, what layers give that Python calls."""

from __future__ import annotations

import logging
import weakref

import torch
from rows import named
from worker_driver import generate, make_driver

from tokasaurus.model.worker.recorded_runner import RecordedRunner
from tokasaurus.model.worker.runner import EagerRunner
from tokasaurus.protocol.commands import ReleaseMemory, RestoreMemory


def make_eager(path, **fields):
    driver = make_driver(path, **fields)
    worker = driver.worker
    worker._runner = EagerRunner(worker._model, worker._backend)
    return driver


def is_recorded(driver):
    runner = driver.worker._runner
    assert isinstance(runner, RecordedRunner)
    return runner._recorded is not None


def test_recorded_layers_give_what_called_ones_give(checkpoint):
    """Chunks of one row, of few, and of the most that a batch has, before steps of one row."""
    for architecture, dtype in (
        ("llama", "float32"),
        ("llama", "bfloat16"),
        ("qwen2", "float32"),
        ("qwen3", "bfloat16"),
    ):
        path = checkpoint(architecture)
        fields = {"dtype": dtype, "max_tokens_per_forward": 128}
        eager, recorded = make_eager(path, **fields), make_driver(path, **fields)
        for length, chunk in ((1, 1), (5, 2), (128, 128), (200, 64), (3, 1)):
            prompt = [5 + i % 200 for i in range(length)]
            with named((architecture, dtype, length)):
                expected = generate(eager, prompt, 6, chunk=chunk)
                assert generate(recorded, prompt, 6, chunk=chunk) == expected
        assert is_recorded(recorded)


def test_hidden_states_of_several_sequences_are_those_of_called_layers(checkpoint):
    path = checkpoint("qwen3")
    hidden = []
    for driver in (make_eager(path), make_driver(path)):
        runner = driver.worker._runner
        run, seen = runner.run, []

        def keep(planned, run=run, seen=seen):
            result = run(planned)
            seen.append(result.clone())
            return result

        runner.run = keep
        for slot, length in enumerate((1, 40, 17, 2)):
            generate(driver, list(range(3, 3 + length)), 3, slot=slot)
        hidden.append(seen)
    assert len(hidden[0]) == len(hidden[1])
    assert all(torch.equal(one, other) for one, other in zip(*hidden, strict=True))


def test_layers_are_recorded_again_after_memory_was_restored(checkpoint):
    driver = make_driver(checkpoint("llama"))
    expected = generate(driver, [5, 6, 7], 4)
    buffers = weakref.ref(driver.worker._runner._recorded)
    driver.control(ReleaseMemory(weights=True, kv_cache=True))
    assert buffers() is None  # they are released, too
    driver.control(RestoreMemory(weights=True, kv_cache=True))
    assert not is_recorded(driver)
    assert generate(driver, [5, 6, 7], 4) == expected
    assert is_recorded(driver)


def test_layers_that_cannot_be_recorded_run_all_the_same(checkpoint, caplog):
    path = checkpoint("llama")
    with caplog.at_level(logging.INFO):
        plain = make_driver(path, linear="plain")
        tokens, _ = generate(plain, [5, 6, 7], 4)
    assert tokens == generate(make_driver(path), [5, 6, 7], 4)[0]
    assert not is_recorded(plain)
    assert caplog.text.count("Python calls the kernels of each batch: the layers call aten.") == 1
