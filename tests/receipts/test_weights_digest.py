"""The digest of weights depends on the tensors, and not on the files that they are in."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from tokasaurus.receipts.weights import NoDigest, stamped, weights_digest

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tensors(**changes):
    torch.manual_seed(0)
    made = {
        EMBEDDING: torch.randn(8, 4),
        "model.layers.0.mlp.weight": torch.randn(4, 4),
        "model.layers.10.mlp.weight": torch.randn(4, 4),
        "model.norm.weight": torch.randn(4),
        HEAD: torch.randn(8, 4),
    }
    return {**made, **changes}


def digest_of(directory, *files, **metadata):
    paths = []
    for number, each in enumerate(files):
        path = directory / f"{number}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in each.items()}, path, metadata)
        paths.append(str(path))
    return weights_digest(stamped(paths))


def test_shards_and_metadata_do_not_count(tmp_path):
    whole = digest_of(tmp_path, tensors())
    items = list(tensors().items())
    assert digest_of(tmp_path, dict(items[3:]), dict(items[:3]), made="by hand") == whole
    assert list(whole.parts) != []
    assert set(whole.parts) == {
        EMBEDDING,
        "model.layers.0",
        "model.layers.10",
        "model.norm.weight",
        HEAD,
    }


def test_a_tensor_that_changes_changes_its_part(tmp_path):
    before = digest_of(tmp_path, tensors())
    name = "model.layers.10.mlp.weight"
    changed = tensors()[name].clone()
    changed[3, 3] = torch.nextafter(changed[3, 3], torch.tensor(9.0))
    for other in (changed, tensors()[name].double(), tensors()[name].view(2, 8)):
        after = digest_of(tmp_path, tensors(**{name: other}))
        assert after.digest != before.digest
        assert {part for part in before.parts if before.parts[part] != after.parts[part]} == {
            "model.layers.10"
        }


def test_a_head_that_repeats_the_embedding_may_be_left_out(tmp_path):
    both = tensors(**{HEAD: tensors()[EMBEDDING].clone()})
    alone = {name: tensor for name, tensor in both.items() if name != HEAD}
    assert digest_of(tmp_path, both) == digest_of(tmp_path, alone)
    assert digest_of(tmp_path, both) != digest_of(tmp_path, tensors())


def test_a_file_that_has_changed_or_gone_has_no_digest(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path)
    files = stamped([str(path)])
    os.utime(path, ns=(1, 1))
    with pytest.raises(NoDigest, match="has changed since the engine read it"):
        weights_digest(files)
    path.unlink()
    with pytest.raises(NoDigest, match=r"not there: .*model\.safetensors cannot be read"):
        weights_digest(files)
    late = stamped([str(path)])
    save_file(tensors(), path)
    with pytest.raises(NoDigest, match="has changed"):
        weights_digest(late)


def test_random_weights_have_a_digest_without_files():
    assert weights_digest([]).digest == "random"
