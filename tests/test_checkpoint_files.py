"""Which files of a directory are the checkpoint, where there is more than one of them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from tokasaurus.checkpoint_files import checkpoint_files
from tokasaurus.errors import ModelError

TENSORS = {name: torch.full((4, 2), float(i)) for i, name in enumerate("abc")}
OTHERS = {**TENSORS, "b": TENSORS["b"] + 1}
HEAD = {"lm_head.weight": torch.ones(2, 2)}
WIDER = {**TENSORS, "b": TENSORS["b"].double()}

# tensors of the single file, tensors of the shards, files of theirs to damage or to remove, choice
ROWS = {
    "only a single file": (TENSORS, None, "", "single"),
    "only shards": (None, TENSORS, "", "shards"),
    "equal copies": (TENSORS, TENSORS, "", "shards"),
    "a stale index without its shards": (OTHERS, TENSORS, "lacks shards", "single"),
    "a stale index of which one shard is left": (OTHERS, TENSORS, "lacks b", "single"),
    "a damaged shard": (OTHERS, TENSORS, "cuts b", "single"),
    "a damaged single file": (OTHERS, TENSORS, "cuts single", "shards"),
    "a single file with a part of the tensors": ({"a": TENSORS["a"]}, TENSORS, "", "shards"),
    "another value": (OTHERS, TENSORS, "", None),
    "another dtype": (WIDER, TENSORS, "", None),
    "another model": ({"x": TENSORS["a"]}, TENSORS, "", None),
    "more tensors": ({**TENSORS, "d": torch.ones(1)}, TENSORS, "", None),
    "a head in the single file only": ({**TENSORS, **HEAD}, TENSORS, "", "single"),
    "a head in the shards only": (TENSORS, {**TENSORS, **HEAD}, "", "shards"),
    "another value and a head": ({**OTHERS, **HEAD}, TENSORS, "", None),
}


def test_the_complete_checkpoint_of_a_directory_is_taken(tmp_path):
    wrong = []
    for number, (name, (alone, sharded, damage, expected)) in enumerate(ROWS.items()):
        path = tmp_path / str(number)
        path.mkdir()
        single = path / "model.safetensors"
        if alone is not None:
            save_file(alone, single)
        if sharded is not None:
            for tensor in sharded:
                save_file({tensor: sharded[tensor]}, path / f"{tensor}.safetensors")
            weight_map = {tensor: f"{tensor}.safetensors" for tensor in sharded}
            index = path / "model.safetensors.index.json"
            index.write_text(json.dumps({"weight_map": weight_map}))
        match damage.split():
            case ["lacks", what]:
                for tensor in "abc" if what == "shards" else what:
                    (path / f"{tensor}.safetensors").unlink()
            case ["cuts", what]:
                file = single if what == "single" else path / f"{what}.safetensors"
                file.write_bytes(file.read_bytes()[:-1])
        try:
            found = "single" if checkpoint_files(path) == [single] else "shards"
        except ModelError as error:
            found = None
            if not ("differ" in str(error) and "delete or rename" in str(error)):
                wrong.append((name, str(error)))
        if found != expected:
            wrong.append((name, found))
    assert wrong == []


def test_shards_that_lie_in_the_single_files_name_are_shards(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, "model.safetensors")}))
    assert checkpoint_files(tmp_path) == [tmp_path / "model.safetensors"]


@pytest.mark.parametrize("size", [(1 << 20), (1 << 20) + 1, 5 << 20])
def test_a_difference_in_the_last_byte_is_found(tmp_path, size):
    tensor = torch.zeros(size, dtype=torch.uint8)
    save_file({"a": tensor}, tmp_path / "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    tensor[-1] = 1
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="differ"):
        checkpoint_files(tmp_path)
