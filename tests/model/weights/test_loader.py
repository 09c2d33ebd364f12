"""Checkpoints that load, and errors about those that do not."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import VOCAB_SIZE, edit_json, make_checkpoint
from rows import named
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tokasaurus.errors import ModelError
from tokasaurus.model.facts import model_facts, read_model_config
from tokasaurus.model.placement import Placement
from tokasaurus.model.weights.dummy import dummy_tensors
from tokasaurus.model.weights.loader import fill_all, load_model
from tokasaurus.model.weights.weight_files import WeightFiles, read_tensors
from tokasaurus.safetensors_file import SafetensorsFile

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
    assert torch.equal(whole.embedding.method.weight, cut.embedding.method.weight)
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
    assert tied.head.method is tied.embedding.method
    untied = load(checkpoint(tied=False))
    assert not torch.equal(untied.head.method.weight, untied.embedding.method.weight)


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


def logits(path):
    """Of ten positions: ours, and those of transformers."""
    ids = torch.arange(3, 13)
    config = read_model_config(path)
    model, _, _ = load_model(path, config, PLACE)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        hidden = theirs.model(ids[None]).last_hidden_state[0]
        return model.logits(hidden), theirs.lm_head(hidden)


def test_a_tied_head_that_differs_from_the_embedding_is_kept(editable, caplog):
    """transformers drops neither: without tying, its answer is the right one."""
    path = editable(tied=False)
    for tied in (False, True):
        edit_json(path / "config.json", tie_word_embeddings=tied)
        caplog.clear()
        found = load(path)
        tensors = load_file(path / "model.safetensors")
        assert torch.equal(found.head.method.weight, tensors["lm_head.weight"]), tied
        assert torch.equal(found.embedding.method.weight, tensors["model.embed_tokens.weight"]), (
            tied
        )
        assert ("'tie_word_embeddings' is true, but" in caplog.text) == tied
        facts = model_facts(path)
        assert facts.num_parameters == sum(tensor.numel() for tensor in tensors.values())
    edit_json(path / "config.json", tie_word_embeddings=False)
    ours, theirs = logits(path)
    torch.testing.assert_close(ours, theirs)


def test_only_a_difference_in_the_vocabulary_unties_a_head(editable):
    """Rows of padding, which one of the two may lack, are no difference; another dtype is one."""
    path = editable(tied=True)
    embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    changed = embedding.clone()
    changed[-1, -1] += 1
    rows = {
        "a copy": (embedding.clone(), True),
        "a copy with padding": (torch.cat([embedding, torch.ones(8, 64)]), True),
        "the last number": (changed, False),
        "another dtype": (embedding.double(), False),
    }
    for name, (head, tied) in rows.items():
        edit_tensors(path, lambda tensors, head=head: tensors.update({"lm_head.weight": head}))
        assert read_model_config(path).tie_word_embeddings == tied, name
        load(path)


def test_a_tied_model_may_have_its_tensor_as_the_head(editable):
    path = editable(tied=True)
    before = dict(load(path).named_parameters())

    def rename(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    edit_tensors(path, rename)
    after = dict(load(path).named_parameters())
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        assert torch.equal(parameter, before[name]), name
    edit_json(path / "config.json", tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"lacks tensors: model\.embed_tokens\.weight"):
        load(path)


@pytest.mark.parametrize("tied", [True, False])
def test_names_without_the_prefix_of_a_model_that_embeds_are_understood(editable, tied, caplog):
    path = editable(architecture="qwen3", tied=tied)
    before = dict(load(path).named_parameters())

    def strip(tensors):
        for name in list(tensors):
            tensor = tensors.pop(name)
            if name != "lm_head.weight":
                tensors[name.removeprefix("model.")] = tensor

    edit_tensors(path, strip)
    model, weights, files = load_model(path, read_model_config(path), PLACE)
    after = dict(model.named_parameters())
    assert after.keys() - before.keys() == set()
    for name, parameter in after.items():
        assert torch.equal(parameter, before[name]), name
    assert ("has no lm_head.weight" in caplog.text) == (not tied)
    assert model_facts(path).num_parameters == weights.num_parameters
    with files.reopened() as again:
        fill_all(weights, again.tensors(), "the same files")


def test_sizes_are_compared_with_the_tensors_before_anything_is_allocated(editable):
    path = editable()
    plain = json.loads((path / "config.json").read_text())
    rows = [
        ("hidden_size", 10**9, r"is 1000000000, but tensor model.embed_tokens.weight has shape"),
        ("vocab_size", 10**10, "is 10000000000, but tensor model.embed_tokens.weight has shape"),
        ("intermediate_size", 10**9, r"is 1000000000, but .*mlp.gate_proj.weight has shape"),
        ("num_hidden_layers", 10**9, "is 1000000000, but the weights have 3 layers"),
        ("num_hidden_layers", 2, "is 2, but the weights have 3 layers"),
        ("num_attention_heads", 8, "is 8, which with head_dim makes 128 rows, but tensor .*q_proj"),
        ("num_key_value_heads", 4, "is 4, which with head_dim makes 64 rows, but tensor .*k_proj"),
    ]
    wrong = []
    for name, value, message in rows:
        edit_json(path / "config.json", **{**plain, name: value})
        try:
            wrong.append((name, model_facts(path)))
        except ModelError as error:
            if not re.search(rf"field '{name}' {message}", str(error)):
                wrong.append((name, str(error)))
        model_facts(path, load_format="dummy")
    assert wrong == []
    edit_json(path / "config.json", **{**plain, "vocab_size": VOCAB_SIZE - 5})
    assert model_facts(path).vocab_size == VOCAB_SIZE - 5


@pytest.mark.parametrize("tied", [True, False])
def test_padding_of_the_vocabulary_is_cut(editable, tied):
    path = editable(tied=tied)
    edit_json(path / "config.json", vocab_size=VOCAB_SIZE - 5)
    model = load(path)
    tensors = load_file(path / "model.safetensors")
    names = ("model.embed_tokens.weight", "model.embed_tokens.weight" if tied else "lm_head.weight")
    for weight, name in zip(
        (model.embedding.method.weight, model.head.method.weight), names, strict=True
    ):
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
    edit_json(path / "config.json", architectures=["LlamaForCausalLM"], model_type="llama")
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


def test_an_update_of_a_tied_model_cannot_bring_a_head_of_its_own(editable):
    path = editable(tied=True)
    _, weights, files = load_model(path, read_model_config(path), PLACE)
    with files.reopened() as again:
        again.check(weights)
    embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    for head, message in ((embedding.clone(), None), (embedding + 1, "one tensor between them")):
        edit_tensors(path, lambda tensors, head=head: tensors.update({"lm_head.weight": head}))
        with WeightFiles([path / "model.safetensors"], "the update") as update:
            if message is None:
                update.check(weights)
                continue
            with pytest.raises(ModelError, match=message):
                update.check(weights)


def test_the_bytes_of_a_file_do_not_stay_in_memory_while_it_is_read(tmp_path):
    def file_bytes():
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssFile:")[1].split()[0])

    num_bytes = 4 << 20
    path = tmp_path / "model.safetensors"
    save_file({str(i): torch.full((num_bytes // 4,), float(i)) for i in range(8)}, path)
    before = file_bytes()
    with SafetensorsFile(path) as file:
        kept = []
        for number, (name, tensor) in enumerate(read_tensors(file)):
            assert tensor.sum().item() == int(name) * tensor.numel()
            kept.append((name, tensor))
            assert file_bytes() - before < 2 * num_bytes, f"after {number} tensors"
        for name, tensor in kept:
            assert (tensor == float(name)).all()


def test_random_weights_differ_between_tensors_and_rows():
    shapes = {"a": (3000, 512), "b": (3000, 512), "n.weight": (4,), "n.bias": (4,)}
    tensors = dict(dummy_tensors(shapes))
    again = dict(dummy_tensors(shapes))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    assert all(torch.equal(tensors[name], again[name]) for name in shapes)
    assert not torch.equal(tensors["a"], tensors["b"])
    rows = tensors["a"].float()
    assert len(rows.unique(dim=0)) == len(rows)
    assert abs(rows.std().item() - 0.02) < 1e-3
    assert abs(rows.mean().item()) < 1e-3
    assert tensors["n.weight"].tolist() == [1] * 4
    assert tensors["n.bias"].tolist() == [0] * 4
