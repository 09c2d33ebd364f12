"""The meaning of a checkpoint's JSON files, and the fields that are refused by name."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import product
from math import prod

import pytest
import torch
from checkpoints import ROPES, edit_json, make_checkpoint, rope_fields
from transformers import LlamaConfig, Qwen2Config, Qwen3Config
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
        shapes_by_name = Weights(model, model.WEIGHTS, config.num_layers).shapes
        actual = sum(prod(each) for each in shapes_by_name.values())
        layers = [n for n in shapes_by_name if n.startswith("model.layers.")]
        products = [shapes_by_name[n] for n in layers if len(shapes_by_name[n]) == 2]
        facts = model_facts(path)
        expected = (actual, sum(map(prod, products)), sum(rows for rows, _ in products))
        counts = (facts.num_parameters, facts.num_product_parameters, facts.num_product_rows)
        if counts != expected or config.num_parameters != actual:
            wrong.append((name, flags, tied, shape, counts, expected))
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
    assert linear.max_position_embeddings == 4 * 64
    yarn = read_model_config(path, '{"type": "yarn", "factor": 4.0}')
    assert isinstance(yarn.rope, YarnRope)
    assert yarn.rope.original_max_position == 64
    assert yarn.max_position_embeddings == 4 * 64
    with pytest.raises(ModelError, match=r"rope_type.*is missing, and factor alone"):
        read_model_config(path, '{"factor": 2}')
    with pytest.raises(ModelError, match=r"rope_scaling=.*not JSON"):
        read_model_config(path, "{oops")


LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
PLAIN = {"rope_type": "default", "factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 128}
# max_position_embeddings, the checkpoint's scaling, the user's, the right number of positions
STRETCHES = [
    (128, None, None, 128),
    (128, None, LINEAR, 512),
    (128, None, YARN, 512),
    (128, None, PLAIN, 128),
    # The checkpoint counts the positions before its scaling.
    (128, LINEAR, None, 512),
    (128, YARN, None, 512),
    (128, PLAIN, None, 128),
    (128, {**YARN, **ORIGINAL}, None, 512),
    (128, LINEAR, LINEAR, 512),
    (128, YARN, YARN, 512),
    (128, YARN, PLAIN, 128),
    # The checkpoint counts them after its scaling.
    (512, {**LINEAR, **ORIGINAL}, None, 512),
    (512, {**YARN, **ORIGINAL}, None, 512),
    (512, {**YARN, **ORIGINAL}, LINEAR, 512),
    (512, {**YARN, **ORIGINAL}, YARN, 512),
    (512, {**YARN, **ORIGINAL}, PLAIN, 128),
    (512, {**YARN, **ORIGINAL}, {**YARN, "original_max_position_embeddings": 256}, 1024),
    (512, {**YARN, **ORIGINAL}, {"rope_type": "yarn", "factor": 8.0}, 1024),
    (512, {"rope_type": "llama3", **LLAMA3}, None, 512),
    (500, {"rope_type": "llama3", **LLAMA3}, None, 500),
    (600, {"rope_type": "llama3", **LLAMA3}, {"rope_type": "llama3", **LLAMA3}, 600),
]


def test_a_scaling_stretches_the_original_positions_once(directory):
    wrong = []
    for max_position, own, override, expected in STRETCHES:
        for spelling in ("rope_scaling", "rope_parameters"):
            path = directory(max_position_embeddings=max_position, **{spelling: own})
            flag = None if override is None else json.dumps(override)
            found = model_facts(path, flag).max_position_embeddings
            if found != expected:
                wrong.append((max_position, own, override, found, expected))
    assert wrong == []


def test_a_yarn_without_an_original_length_stretches_the_checkpoints(directory):
    path = directory(max_position_embeddings=512, rope_scaling={**YARN, **ORIGINAL})
    rope = read_model_config(path, json.dumps(YARN)).rope
    assert isinstance(rope, YarnRope)
    assert rope.original_max_position == 128


def test_rotary_frequencies_are_those_of_transformers(directory):
    for rope in (
        *ROPES.values(),
        {**ROPES["yarn"], "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3},
        {**ROPES["yarn"], "mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False},
    ):
        config = read_model_config(directory(rope_parameters=rope))
        theirs = LlamaConfig(hidden_size=64, num_attention_heads=4, **rope_fields(rope))
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
    (
        {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 64},
        "'use_sliding_window' is true",
    ),
    (
        {"use_sliding_window": True, "max_window_layers": 1, "max_position_embeddings": "absent"}
        | {"architectures": ["Qwen2ForCausalLM"]},
        "'use_sliding_window' is true",
    ),
    ({"sliding_window": 64}, "'sliding_window' is 64"),
    ({"model_type": "mistral", "sliding_window": 64}, "'model_type' is 'mistral', which contr"),
    ({"model_type": "mistral"}, "'model_type' is 'mistral', which contradicts"),
    (
        {"model_type": "granite", "embedding_multiplier": 12.0, "logits_scaling": 8.0},
        "'model_type' is 'granite', which contradicts",
    ),
    ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen2"}, "'model_type' is 'qwen2'"),
    ({"embedding_multiplier": 12.0}, "'embedding_multiplier' is 12.0, which is not supported"),
    ({"attention_multiplier": 0.5}, "'attention_multiplier' is 0.5: llama models do not have it"),
    ({"residual_multiplier": 0.22}, "'residual_multiplier' is 0.22"),
    ({"logits_scaling": 8}, "'logits_scaling' is 8"),
    ({"is_causal": False}, "'is_causal' is False"),
    ({"use_bidirectional_attention": True}, "'use_bidirectional_attention' is True"),
    ({"is_encoder_decoder": True}, "'is_encoder_decoder' is True"),
    ({"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' is 50.0"),
    ({"final_logit_softcapping": 30.0}, "'final_logit_softcapping' is 30.0"),
    ({"no_rope_layers": [1, 0]}, r"'no_rope_layers' is \[1, 0\]"),
    ({"num_experts": 8}, "'num_experts' is 8"),
    ({"use_qk_norm": True}, "'use_qk_norm' is True"),
    ({"rotary_emb_base": 1e6}, "'rotary_emb_base' is 1000000.0"),
    ({"quantization": {"bits": 4}}, r"'quantization' is \{'bits': 4\}"),
    ({"dual_chunk_attention_config": {"chunk_size": 8}}, "'dual_chunk_attention_config' is"),
    ({"invented": False}, "'invented' is False: llama models do not have it"),
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
    rows = [
        {"model_type": "llama", "is_causal": True, "logits_scaling": 1, "residual_multiplier": 1.0},
        {"invented": None, "attn_logit_softcapping": None},
        {"_name_or_path": "a/b", "unsloth_fixed": True, "transformers.js_config": {"dtype": "q4"}},
        {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None},
        {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 512},
        {
            "use_sliding_window": True,
            "max_window_layers": 0,
            "sliding_window": 64,
            "layer_types": ["full_attention"] * 2,
        },
        {"use_sliding_window": False, "max_window_layers": 0, "sliding_window": 64},
    ]
    for row in rows:
        assert read_model_config(directory(**row)) == plain, row


def test_every_field_that_transformers_writes_by_itself_is_known(directory):
    """With its defaults, of the classes that it has for our architectures."""
    classes = {
        "LlamaForCausalLM": LlamaConfig,
        "Qwen2ForCausalLM": Qwen2Config,
        "Qwen3ForCausalLM": Qwen3Config,
    }
    for name, config_class in classes.items():
        theirs = {**config_class().to_dict(), "architectures": [name]}
        found = read_model_config(directory(**theirs))
        assert found.num_layers == theirs["num_hidden_layers"], name
        assert found.head_dim == theirs.get("head_dim", found.hidden_size // found.num_heads), name
        absent = directory(architectures=[name], max_position_embeddings="absent")
        expected = theirs["max_position_embeddings"]
        assert read_model_config(absent).max_position_embeddings == expected, name


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


def test_the_dtype_is_that_of_the_files_or_of_config_json(directory, tmp_path):
    for fields, expected in (
        ({}, None),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"dtype": "auto"}, None),
    ):
        assert model_facts(directory(**fields)).dtype == expected, fields
    for dtype, expected in ((torch.bfloat16, "bfloat16"), (torch.float32, "float32")):
        path = make_checkpoint(tmp_path / expected, "llama", dtype=dtype)
        edit_json(path / "config.json", dtype="float16")
        assert model_facts(path).dtype == expected


def test_facts_from_generation_config(directory):
    facts = model_facts(
        directory({"eos_token_id": [5, 6], "temperature": 0.6, "top_k": 20, "top_p": 0.95})
    )
    assert facts.eos_token_ids == (5, 6, 2)
    assert facts.sampling_defaults == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert model_facts(directory({"eos_token_id": 0})).eos_token_ids == (0, 2)
    assert model_facts(directory({"eos_token_id": [5, 100, -1]})).eos_token_ids == (5, 2)
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


ADDED = {"added_tokens": [{"id": 7, "content": "<|im_end|>"}]}
IM_END = {"eos_token": "<|im_end|>"}
# generation_config.json's ids, config.json's, other files, the right ids
ENDS = {
    "no tokenizer": (5, 2, {}, (5, 2)),
    "a fine-tune with ChatML": (None, 2, {"tokenizer_config": IM_END, "tokenizer": ADDED}, (2, 7)),
    "no configuration names one": (
        None,
        "absent",
        {"tokenizer_config": IM_END, "tokenizer": ADDED},
        (7,),
    ),
    "all agree": (7, [7], {"tokenizer_config": IM_END, "tokenizer": ADDED}, (7,)),
    "an object": (
        [5, 6],
        2,
        {
            "tokenizer_config": {"eos_token": {"content": "<|im_end|>", "lstrip": False}},
            "tokenizer": ADDED,
        },
        (5, 6, 2, 7),
    ),
    "another file of special tokens": (
        None,
        2,
        {"special_tokens_map": IM_END, "tokenizer": ADDED},
        (2, 7),
    ),
    "a token of the vocabulary": (
        None,
        2,
        {"tokenizer_config": IM_END, "tokenizer": {"model": {"vocab": {"a": 1, "<|im_end|>": 9}}}},
        (2, 9),
    ),
    "a unigram vocabulary": (
        None,
        2,
        {
            "tokenizer_config": IM_END,
            "tokenizer": {"model": {"vocab": [["a", 0.0], ["<|im_end|>", 0.0]]}},
        },
        (2, 1),
    ),
    "a token that only the settings have": (
        None,
        2,
        {"tokenizer_config": {**IM_END, "added_tokens_decoder": {"8": {"content": "<|im_end|>"}}}},
        (2, 8),
    ),
    "a vocabulary in a file of its own": (
        None,
        2,
        {"tokenizer_config": IM_END, "vocab": {"<|im_end|>": 11}},
        (2, 11),
    ),
    "beyond the model's vocabulary": (
        None,
        2,
        {"tokenizer_config": IM_END, "vocab": {"<|im_end|>": 100}},
        (2,),
    ),
    "nonsense": (
        None,
        2,
        {"tokenizer_config": IM_END, "tokenizer": {"added_tokens": 3, "model": []}, "vocab": []},
        (2,),
    ),
}


def test_a_text_ends_at_the_tokens_of_all_configurations_and_of_the_tokenizer(directory):
    wrong, written = [], []
    for name, (generation, config, files, expected) in ENDS.items():
        path = directory({"eos_token_id": generation}, eos_token_id=config)
        for file in written:
            file.unlink()
        written = [path / f"{file}.json" for file in files]
        for file, values in zip(written, files.values(), strict=True):
            file.write_text(json.dumps(values))
        if (found := model_facts(path).eos_token_ids) != expected:
            wrong.append((name, found, expected))
    assert wrong == []


def test_the_tokenizer_of_another_directory_ends_texts(directory, tmp_path):
    elsewhere = tmp_path / "tokenizer"
    elsewhere.mkdir()
    (elsewhere / "tokenizer_config.json").write_text(json.dumps(IM_END))
    (elsewhere / "tokenizer.json").write_text(json.dumps(ADDED))
    assert model_facts(directory(), tokenizer=elsewhere).eos_token_ids == (2, 7)


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
