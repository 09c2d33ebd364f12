"""Checkpoints that load, and errors about those that do not."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from checkpoints import VOCAB_SIZE, edit_json, make_checkpoint
from rows import named
from safetensors.torch import load_file, save_file

from tokasaurus.errors import ModelError
from tokasaurus.model.facts import read_model_config
from tokasaurus.model.placement import Placement
from tokasaurus.model.weights.loader import load_model

PLACE = Placement(torch.float32, torch.device("cpu"))
QUERY = "model.layers.1.self_attn.q_proj.weight"


def load(path, place=PLACE):
    model, _, _ = load_model(path, read_model_config(path), place)
    return model


@pytest.fixture
def editable(checkpoint, tmp_path):
    """Makes a copy of a checkpoint that a test may change."""

    def make(**options):
        path = tmp_path / "model"
        shutil.copytree(checkpoint(**options), path)
        return path

    return make


def edit_tensors(path, change):
    """``change`` edits the dictionary of tensors."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_shards_load_like_one_file(checkpoint):
    whole, cut = load(checkpoint(seed=3)), load(checkpoint(seed=3, shards=4))
    assert len(list(checkpoint(seed=3, shards=4).glob("*.safetensors"))) >= 4
    assert torch.equal(whole.embedding.weight, cut.embedding.weight)
    for one, other in zip(whole.layers.values(), cut.layers.values(), strict=True):
        assert torch.equal(one.mlp_norm.weight, other.mlp_norm.weight)
        assert torch.equal(one.attention.qkv.method.weight, other.attention.qkv.method.weight)
        assert torch.equal(one.mlp.down.method.weight, other.mlp.down.method.weight)


def test_fused_parameters_are_in_order(checkpoint):
    path = checkpoint("qwen2")
    tensors, model = load_file(path / "model.safetensors"), load(path)
    names = [f"model.layers.1.self_attn.{x}_proj" for x in "qkv"]
    layer = model.layers["1"]
    for kind in ("weight", "bias"):
        expected = torch.cat([tensors[f"{name}.{kind}"] for name in names])
        assert torch.equal(getattr(layer.attention.qkv.method, kind), expected)
    gate_up = torch.cat([tensors[f"model.layers.1.mlp.{x}_proj.weight"] for x in ("gate", "up")])
    assert torch.equal(layer.mlp.gate_up.method.weight, gate_up)


def test_tensors_are_converted_to_the_asked_dtype(checkpoint):
    for dtype in (torch.bfloat16, torch.float16):
        path = checkpoint(dtype=dtype)
        wide, narrow = load(path), load(path, Placement(dtype, PLACE.device))
        assert narrow.norm.weight.dtype == dtype
        assert torch.equal(wide.norm.weight, narrow.norm.weight.float()), dtype


def test_a_tied_head_shares_the_memory_of_the_embedding(checkpoint):
    tied = load(checkpoint(tied=True))
    assert tied.head.method.weight is tied.embedding.weight
    untied = load(checkpoint(tied=False))
    assert not torch.equal(untied.head.method.weight, untied.embedding.weight)


def test_derived_tensors_and_a_copy_of_a_tied_head_are_ignored(editable):
    path = editable(tied=True)
    before = dict(load(path).named_parameters())

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    edit_tensors(path, add)
    after = dict(load(path).named_parameters())
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("tied", [True, False])
def test_padding_of_the_vocabulary_is_cut(editable, tied):
    path = editable(tied=tied)
    edit_json(path / "config.json", vocab_size=VOCAB_SIZE - 5)
    model = load(path)
    tensors = load_file(path / "model.safetensors")
    names = ("model.embed_tokens.weight", "model.embed_tokens.weight" if tied else "lm_head.weight")
    for weight, name in zip((model.embedding.weight, model.head.method.weight), names, strict=True):
        assert torch.equal(weight, tensors[name][: VOCAB_SIZE - 5])


def test_a_vocabulary_with_too_few_rows_is_refused(editable):
    path = editable()
    edit_json(path / "config.json", vocab_size=VOCAB_SIZE + 5)
    shape = r"model\.embed_tokens\.weight has shape \[264, 64\].*asks for \[269, 64\]"
    with pytest.raises(ModelError, match=rf"{shape}|lm_head"):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(QUERY), f"lacks tensors: {QUERY}"),
        (lambda t: t.pop("lm_head.weight"), "lacks tensors: lm_head.weight"),
        (
            lambda t: t.update({QUERY: t[QUERY][:-1].clone()}),
            rf"{QUERY} has shape \[63, 64\]; config.json asks for \[64, 64\]",
        ),
        (lambda t: t.update({QUERY + "_scale": torch.ones(1)}), f"does not use: {QUERY}_scale"),
        (
            lambda t: t.update({QUERY: t[QUERY].to(torch.int8)}),
            f"tensor {QUERY} is torch.int8: quantized",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if "layers.2" in name],
            r"lacks tensors: model\.layers\.2\.input_layernorm\.weight, .* and 4 more",
        ),
    ],
    ids=["missing", "no head", "shape", "unknown", "quantized", "a layer"],
)
def test_wrong_tensors_are_named(editable, change, message):
    path = editable()
    edit_tensors(path, change)
    with pytest.raises(ModelError, match=message):
        load(path)


def test_biases_that_the_architecture_does_not_have_are_refused(editable):
    path = editable(architecture="qwen2")
    edit_json(path / "config.json", architectures=["LlamaForCausalLM"])
    with pytest.raises(
        ModelError, match=r"does not use: model\.layers\.0\.self_attn\.k_proj\.bias"
    ):
        load(path)


def test_a_missing_shard_is_named(editable):
    path = editable(shards=3)
    shard = sorted(path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"lacks 1 of .* weight files: {shard.name}"):
        load(path)


def test_a_truncated_file_is_named(editable):
    path = editable()
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged or incomplete"):
        load(path)


def test_an_unreadable_index_is_refused(editable):
    path = editable(shards=3)
    for index in ("{}", "[]", "oops", '{"weight_map": {"a": "../b"}}'):
        (path / "model.safetensors.index.json").write_text(index)
        with named(index), pytest.raises(ModelError, match=r"index\.json.*weight_map"):
            load(path)


def test_checkpoints_in_other_formats_are_refused_with_a_remedy(editable):
    path = editable()
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match=r"only pytorch_model\.bin; convert it once.*save_pretrained"
    ):
        load(path)
    (path / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="no weights at all"):
        load(path)


def test_make_checkpoint_writes_both_styles_of_config(tmp_path):
    """A test of the tests' own tool."""
    old = make_checkpoint(tmp_path / "4", "llama", rope="llama3", config_style=4)
    new = make_checkpoint(tmp_path / "5", "llama", rope="llama3")
    old_fields = json.loads((old / "config.json").read_text())
    new_fields = json.loads((new / "config.json").read_text())
    assert {"rope_scaling", "rope_theta", "torch_dtype"} <= set(old_fields)
    assert "rope_parameters" not in old_fields
    assert {"rope_parameters", "dtype"} <= set(new_fields)
    assert read_model_config(old) == read_model_config(new)
