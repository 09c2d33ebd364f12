"""The meaning of a checkpoint's JSON files, and the fields that are refused by name."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import product

import pytest
import torch
from checkpoints import ROPES
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tokasaurus import SamplingParams
from tokasaurus.errors import ModelError, RequestError
from tokasaurus.model import get_model_cls
from tokasaurus.model.architectures.registry import ARCHITECTURES
from tokasaurus.model.facts import model_facts, read_model_config
from tokasaurus.model.layers.rotary import _frequencies
from tokasaurus.model.placement import Placement
from tokasaurus.model.rope_config import DefaultRope, LinearRope, Llama3Rope, YarnRope
from tokasaurus.model.weights.weights import Weights
from tokasaurus.protocol.messages import SAMPLING_LIMITS

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
}


@pytest.fixture
def directory(tmp_path):
    def write(generation=None, **fields):
        values = {k: v for k, v in {**LLAMA, **fields}.items() if v != "absent"}
        (tmp_path / "config.json").write_text(json.dumps(values))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return tmp_path

    return write


def test_absent_fields_have_the_defaults_of_transformers(directory):
    config = read_model_config(directory())
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 4, 16)
    assert config.rope == DefaultRope(10_000.0)
    assert config.rms_norm_eps == 1e-6
    assert not config.tie_word_embeddings
    assert config.kv_elements_per_token == 2 * 2 * 4 * 16


def test_each_architecture_reads_its_own_biases_norms_and_head_size(directory):
    plain = {"architecture": "LlamaForCausalLM", "head_dim": 16, "qk_norm": False}
    no_biases = {"qkv_bias": False, "output_bias": False, "mlp_bias": False}
    expected = {
        ("LlamaForCausalLM", False): {**plain, **no_biases},
        ("LlamaForCausalLM", True): {
            **plain,
            "qkv_bias": True,
            "output_bias": True,
            "mlp_bias": True,
        },
        ("Qwen2ForCausalLM", False): {"head_dim": 16, **no_biases, "qkv_bias": True},
        ("Qwen2ForCausalLM", True): {"output_bias": False, "mlp_bias": False, "qk_norm": False},
        ("Qwen3ForCausalLM", False): {"head_dim": 128, **no_biases, "qk_norm": True},
        ("Qwen3ForCausalLM", True): {"qkv_bias": True, "output_bias": True, "mlp_bias": False},
    }
    for (name, biases), fields in expected.items():
        config = read_model_config(
            directory(architectures=[name], attention_bias=biases, mlp_bias=biases)
        )
        found = {field: getattr(config, field) for field in fields}
        assert found == fields, (name, biases)


def test_the_number_of_parameters_is_that_of_the_model(directory):
    """For every architecture, with and without biases and a tied head, in several shapes."""
    shapes = (
        {},
        {"num_attention_heads": 8, "num_key_value_heads": 2},
        {"head_dim": 48, "num_key_value_heads": 1, "num_hidden_layers": 5, "vocab_size": 37},
    )
    place, wrong = Placement(torch.float32, torch.device("meta")), []
    for name, biases, tied, shape in product(ARCHITECTURES, (0, 1), (0, 1), shapes):
        flags = {"attention_bias": bool(biases), "mlp_bias": bool(biases)}
        path = directory(architectures=[name], tie_word_embeddings=bool(tied), **flags, **shape)
        config = read_model_config(path)
        model = get_model_cls(name)(config, place)
        actual = Weights(model, model.WEIGHTS, config.num_layers).num_parameters
        facts = model_facts(path)
        if (config.num_parameters, facts.num_parameters) != (actual, actual):
            wrong.append((name, flags, tied, shape, config.num_parameters, actual))
        shared = config.vocab_size * config.hidden_size if tied else 0
        assert facts.num_tied_parameters == shared
    assert wrong == []


LLAMA3 = {k: v for k, v in ROPES["llama3"].items() if k not in ("rope_type", "rope_theta")}


def test_every_spelling_of_rope_is_read(directory):
    for fields in (
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "llama3", **LLAMA3}},
    ):
        rope = read_model_config(directory(**fields)).rope
        assert rope == Llama3Rope(5e5, 8.0, 1.0, 4.0, 64), fields


def test_an_override_replaces_the_scaling_of_the_checkpoint(directory):
    path = directory(rope_parameters={"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3})
    plain = read_model_config(path, '{"rope_type": "default"}')
    assert plain.rope == DefaultRope(5e5)
    linear = read_model_config(path, '{"rope_type": "linear", "factor": 4, "rope_theta": 7}')
    assert linear.rope == LinearRope(7.0, 4.0)
    assert linear.max_position_embeddings == 2048
    yarn = read_model_config(path, '{"type": "yarn", "factor": 4.0}')
    assert isinstance(yarn.rope, YarnRope)
    assert yarn.rope.original_max_position == 512
    assert yarn.max_position_embeddings == 2048
    with pytest.raises(ModelError, match=r"rope_type.*is missing, and factor alone"):
        read_model_config(path, '{"factor": 2}')
    with pytest.raises(ModelError, match=r"rope_scaling=.*not JSON"):
        read_model_config(path, "{oops")


def test_rotary_frequencies_are_those_of_transformers(directory):
    for rope in (
        *ROPES.values(),
        {**ROPES["yarn"], "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3},
        {**ROPES["yarn"], "mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False},
    ):
        config = read_model_config(directory(rope_parameters=rope))
        theirs = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=dict(rope))
        frequencies, scale = _frequencies(config.rope, config.head_dim)
        if rope["rope_type"] == "default":
            expected, expected_scale = 10000.0 ** -(torch.arange(0, 16, 2) / 16), 1.0
        else:
            compute = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
            expected, expected_scale = compute(theirs, torch.device("cpu"))
        torch.testing.assert_close(
            frequencies, expected, atol=0, rtol=3e-7, msg=lambda text, rope=rope: f"{rope}: {text}"
        )
        assert scale == pytest.approx(expected_scale), rope


REFUSALS = [
    (
        {"architectures": ["MistralForCausalLM"]},
        "'architectures' is 'MistralForCausalLM'.*Qwen3",
    ),
    ({"architectures": "absent"}, "'architectures' is missing; supported: LlamaForCausalLM"),
    ({"hidden_size": "absent"}, "'hidden_size' is missing"),
    ({"vocab_size": "many"}, "'vocab_size' must be an integer of at least 1, not 'many'"),
    ({"num_hidden_layers": 0}, "'num_hidden_layers' must be an integer of at least 1"),
    ({"num_key_value_heads": 3}, "'num_key_value_heads' is 3, which does not divide 4"),
    ({"num_attention_heads": 5}, "'head_dim' is missing.*not a multiple of 5"),
    ({"head_dim": 15}, "'head_dim' is 15.*even"),
    ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
    ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' must be finite"),
    ({"tie_word_embeddings": 1}, "'tie_word_embeddings' must be true or false"),
    ({"quantization_config": {"bits": 4}}, "'quantization_config' is set"),
    ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "'rope_scaling.rope_type' is 'longrope'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "'rope_scaling.type' is 'dynamic'"),
    ({"rope_scaling": {"type": "linear"}}, "'rope_scaling.factor' is missing"),
    ({"rope_parameters": {"rope_theta": -1}}, "'rope_parameters.rope_theta' must be above 0"),
    (
        {"rope_parameters": {"full_attention": {}}},
        "'rope_parameters.full_attention' is an object",
    ),
    ({"rope_parameters": 3}, "'rope_parameters' must be an object"),
    ({"layer_types": ["sliding_attention"]}, "'layer_types' has 'sliding_attention'"),
    ({"use_sliding_window": True, "max_window_layers": 1}, "'use_sliding_window' is true"),
]


def test_unsupported_and_malformed_fields_are_refused_by_name(directory):
    failures = []
    for fields, message in REFUSALS:
        try:
            failures.append((fields, read_model_config(directory(**fields))))
        except ModelError as error:
            if not re.search(rf"config\.json: field {message}", str(error)):
                failures.append((fields, str(error)))
    assert failures == []


def test_harmless_fields_change_nothing(directory):
    plain = read_model_config(directory())
    harmless = directory(
        use_sliding_window=True,
        max_window_layers=28,
        sliding_window=4096,
        layer_types=["full_attention"] * 2,
        pretraining_tp=2,
        rope_scaling=None,
        quantization_config=None,
        attention_dropout=0.1,
        auto_map={"AutoModel": "code.Model"},
    )
    assert read_model_config(harmless) == plain


def test_directories_without_a_readable_config_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        read_model_config(tmp_path)
    with pytest.raises(ModelError, match="not a directory"):
        read_model_config(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="must hold a JSON object"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        read_model_config(tmp_path)


def test_facts_without_a_generation_config(directory):
    facts = model_facts(directory())
    assert (facts.vocab_size, facts.max_position_embeddings) == (100, 512)
    assert facts.eos_token_ids == (2,)
    assert facts.kv_elements_per_token == 256
    assert facts.sampling_defaults == {}


def test_facts_from_generation_config(directory):
    facts = model_facts(
        directory({"eos_token_id": [5, 6], "temperature": 0.6, "top_k": 20, "top_p": 0.95})
    )
    assert facts.eos_token_ids == (5, 6)
    assert facts.sampling_defaults == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert model_facts(directory({"eos_token_id": 0})).eos_token_ids == (0,)
    assert model_facts(directory({"eos_token_id": [5, 100, -1]})).eos_token_ids == (5,)
    greedy = model_facts(directory({"do_sample": False, "temperature": None}))
    assert (greedy.sampling_defaults, greedy.eos_token_ids) == ({}, (2,))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order-mark"])
def test_a_generation_config_may_say_what_requests_may_say(directory, mark):
    for said, read in (
        ({"top_k": -1}, {"top_k": -1}),
        ({"top_k": 20.0}, {"top_k": 20}),
        ({"top_k": 0}, {"top_k": 0}),
        ({"top_p": 0}, {"top_p": 0}),
        ({"temperature": 1e-9, "min_p": 0.5}, {"temperature": 1e-9, "min_p": 0.5}),
    ):
        path = directory(said)
        for file in path.glob("*.json"):
            file.write_bytes(mark + file.read_bytes())
        assert model_facts(path).sampling_defaults == read, said


def test_nonsense_in_a_generation_config_is_refused_as_in_a_request(directory):
    for name, (low, high) in SAMPLING_LIMITS.items():
        for value in (low - 0.5, high * 2 + 1, float("nan"), float("inf"), "1", True, [1]):
            with pytest.raises(ModelError, match=rf"generation_config\.json: field '{name}' must"):
                model_facts(directory({name: value}))
            with pytest.raises(RequestError, match=name):
                SamplingParams(**{name: value})
        for value in (low, high):
            model_facts(directory({name: value}))
            SamplingParams(**{name: value})
    with pytest.raises(ModelError, match=r"'top_k' must be a whole number, not 20\.5"):
        model_facts(directory({"top_k": 20.5}))


def test_facts_of_every_architecture_are_read_without_torch(directory):
    for name in ARCHITECTURES:
        path = directory(architectures=[name])
        code = (
            "import sys; from tokasaurus.model.facts import model_facts; "
            f"assert model_facts({str(path)!r}).vocab_size == 100; "
            "assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


def test_the_class_of_an_unknown_architecture_is_refused():
    with pytest.raises(ModelError, match="architecture 'GPT' is not supported; supported: Llama"):
        get_model_cls("GPT")
