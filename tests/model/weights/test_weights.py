"""A checkpoint, dummy weights and a stream fill a model on one path."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from worker_driver import generate, make_driver

from tokasaurus.errors import ModelError
from tokasaurus.model.facts import read_model_config
from tokasaurus.model.placement import Placement
from tokasaurus.model.weights.loader import fill_all, load_model

PROMPT = list(range(3, 40))
QUERY = "model.layers.1.self_attn.q_proj.weight"


def load(path, *, linear="plain", load_format="auto"):
    place = Placement(torch.float32, torch.device("cpu"), linear)
    return load_model(path, read_model_config(path), place, load_format)


def stream(path):
    """A checkpoint's tensors, the last first."""
    return reversed(load_file(path / "model.safetensors").items())


@pytest.mark.parametrize("linear", ["plain", "packed"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_stream_replaces_the_weights_of_a_running_worker(checkpoint, linear, tied):
    one, other = checkpoint(seed=1, tied=tied), checkpoint(seed=2, tied=tied)
    expected = [generate(make_driver(path, linear=linear), PROMPT, 12) for path in (one, other)]
    assert expected[0] != expected[1]
    driver = make_driver(one, linear=linear)
    assert generate(driver, PROMPT, 12, slot=0) == expected[0]
    fill_all(driver.worker.weights, stream(other), "the stream")
    assert generate(driver, PROMPT, 12, slot=1) == expected[1]
    fill_all(driver.worker.weights, stream(one), "the stream")
    assert generate(driver, PROMPT, 12, slot=2) == expected[0]


def test_shapes_are_those_of_the_checkpoint(checkpoint):
    for architecture, tied in (
        ("llama", True),
        ("llama", False),
        ("qwen2", False),
        ("qwen3", True),
    ):
        path = checkpoint(architecture, tied=tied)
        _, weights, _ = load(path)
        tensors = load_file(path / "model.safetensors")
        assert weights.shapes == {name: tuple(t.shape) for name, t in tensors.items()}
        assert weights.num_parameters == sum(t.numel() for t in tensors.values())


def test_every_round_of_filling_must_be_complete(checkpoint):
    path = checkpoint("qwen3")
    _, weights, _ = load(path)
    tensors = dict(stream(path))
    assert weights.missing() == list(weights.shapes)
    kept = tensors.pop(QUERY)
    with pytest.raises(ModelError, match=f"the stream lacks tensors: {QUERY}$"):
        fill_all(weights, tensors.items(), "the stream")
    assert weights.missing() == [QUERY]
    with pytest.raises(ModelError, match=f"the weights lack tensors: {QUERY}$"):
        weights.finish()
    weights.fill(QUERY, kept)
    weights.finish()


def test_a_tensor_can_be_checked_before_there_is_one(checkpoint):
    _, weights, _ = load(checkpoint())
    shape = weights.shapes[QUERY]
    weights.check(QUERY, shape, torch.bfloat16)
    with pytest.raises(ModelError, match=rf"{QUERY} has shape \[1, 1\]"):
        weights.check(QUERY, (1, 1), torch.bfloat16)
    with pytest.raises(ModelError, match="quantized"):
        weights.check(QUERY, shape, torch.int8)


def test_dummy_weights_need_no_file_and_are_always_the_same(checkpoint, tmp_path):
    source = checkpoint("qwen2")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    drivers = [make_driver(tmp_path, load_format="dummy") for _ in range(2)]
    generated = [generate(driver, PROMPT, 12) for driver in drivers]
    assert generated[0] == generated[1]
    assert len(set(generated[0][0])) > 1
    assert all(-20 < logprob < 0 for logprob in generated[0][1])
