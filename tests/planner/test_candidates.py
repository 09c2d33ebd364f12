"""Which configurations fit a device: the same arithmetic as at an engine's start."""

from __future__ import annotations

import pytest
from described_models import LLAMA_1B, LLAMA_8B, LLAMA_70B, describe

from tokasaurus.errors import ConfigError
from tokasaurus.model.facts import model_facts
from tokasaurus.planner.candidates import Layout, Question, candidate, fitting, layouts
from tokasaurus.planner.devices import find_device


@pytest.fixture
def question(tmp_path):
    def make(model, device, count=1, **changes):
        facts = model_facts(describe(tmp_path, model))
        return Question(facts, find_device(device), count, **changes)

    return make


def test_a_layout_deals_all_devices(question):
    found = layouts(question(LLAMA_8B, "l4", 8))
    assert len(found) == len(set(found)) == 10
    assert {layout.num_devices for layout in found} == {8}
    assert layouts(question(LLAMA_8B, "l4", 8, sizes={"tp_size": 2, "dp_size": 2})) == [
        Layout(2, 2, 2)
    ]


def test_weights_batch_and_kv_cache_add_up_to_the_memory_of_the_device(question):
    asked = question(LLAMA_8B, "l4")
    found = candidate(asked, Layout(1, 1, 1), max_tokens_per_forward=2048)
    num_parameters = 8_030_261_248  # as published
    assert asked.facts.num_parameters == num_parameters
    kv_bytes = found.kv_tokens * 2 * 32 * 8 * 128 * 2
    used = 2 * num_parameters + kv_bytes + (512 << 20)
    assert 0.6 * 24e9 < used < 0.9 * 24e9  # a tenth stays free, and a batch takes 2.5 GB


def test_two_devices_that_share_layers_hold_more_than_twice_the_kv(question):
    one = candidate(question(LLAMA_8B, "l4", 2), Layout(2, 1, 1), max_tokens_per_forward=2048)
    two = candidate(question(LLAMA_8B, "l4", 2), Layout(1, 2, 1), max_tokens_per_forward=2048)
    assert two.kv_tokens > 2.2 * one.kv_tokens


def test_only_layouts_that_hold_the_model_and_divide_its_heads_are_found(question):
    found = fitting(question(LLAMA_70B, "h100", 8))
    assert Layout(8, 1, 1) not in found
    # With 70 GB of weights on each device, little is left.
    assert found[Layout(4, 2, 1)].kv_tokens < found[Layout(2, 4, 1)].kv_tokens / 20
    assert {Layout(2, 4, 1), Layout(1, 8, 1), Layout(1, 2, 4)} <= set(found)
    odd = fitting(question(LLAMA_8B, "h100", 6))
    assert Layout(2, 3, 1) not in odd  # 32 heads
    assert Layout(3, 2, 1) in odd


def test_a_model_that_fits_nowhere_gets_the_arithmetic_and_a_number_of_devices(question):
    with pytest.raises(ConfigError) as caught:
        fitting(question(LLAMA_70B, "l4", 4))
    text = str(caught.value)
    assert text.startswith("no way to use 4 x NVIDIA L4, 24 GB holds this:\ntp 4: model=")
    assert "the weights take 35.3 GB in bfloat16" in text
    assert "cuda has 24.0 GB free" in text
    assert text.endswith("\ngpus=8 would do, with tp 2 x pp 4")
    assert fitting(question(LLAMA_70B, "l4", 8))


def test_devices_without_links_only_make_replicas(question, tmp_path):
    path = tmp_path / "lone.yaml"
    path.write_text("{name: Lone, memory_gb: 8, read_gb_per_s: 300, tflop_per_s: {bfloat16: 60}}")
    with pytest.raises(ConfigError, match="more devices would not help"):
        fitting(question(LLAMA_8B, str(path)))
    assert list(fitting(question(LLAMA_1B, str(path)))) == [Layout(1, 1, 1)]
    assert list(fitting(question(LLAMA_1B, str(path), 4))) == [Layout(4, 1, 1)]
    with pytest.raises(ConfigError, match="tp_size=2; change one of them: the links of the device"):
        fitting(question(LLAMA_1B, str(path), 4, sizes={"tp_size": 2}))


def test_decided_sizes_that_cannot_be_dealt_are_named(question):
    with pytest.raises(ConfigError, match="gpus=4 cannot be dealt with tp_size=3"):
        fitting(question(LLAMA_8B, "l4", 4, sizes={"tp_size": 3}))


def test_decided_flags_are_kept(question):
    flags = {"kv_cache_num_tokens": 4096, "page_size": 32, "dtype": "float16"}
    found = candidate(question(LLAMA_8B, "h100", flags=flags), Layout(1, 1, 1), page_size=16)
    assert found.kv_tokens == 4096
    assert found.manager.page_size == 32
    assert found.dtype == "float16"
    assert {"kv_cache_num_tokens=4096", "page_size=32", "dtype=float16"} == set(found.words)
