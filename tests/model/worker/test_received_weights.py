"""Tensors that came from a trainer: what waits, what fills the model, and what is refused."""

from __future__ import annotations

import shutil

import pytest
import torch
from checkpoints import VOCAB_SIZE, edit_json
from rows import check_each
from safetensors.torch import load_file
from worker_driver import generate, make_driver

from tokasaurus.errors import ModelError
from tokasaurus.protocol.commands import (
    JoinWeightsGroup,
    LeaveWeightsGroup,
    ReceiveWeights,
    ReleaseMemory,
    RestoreMemory,
    UpdateWeights,
)

PROMPT = list(range(3, 40))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tokens(driver):
    return generate(driver, PROMPT, 12)


def tensors_of(path):
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def staged_in(driver):
    return driver.worker._controls._groups.staged


def take(driver, tensors, version=1):
    staged = staged_in(driver)
    update = staged.begin(set(tensors), anew=True)
    for name, tensor in tensors.items():
        staged.check(name, tuple(tensor.shape), tensor.dtype)
        staged.put(name, tensor.clone(), update)
    return driver.control(UpdateWeights(version, (), (), True))


@pytest.mark.parametrize("linear", ["plain", "packed"])
def test_received_tensors_give_what_a_fresh_worker_gives(checkpoint, linear):
    def check(row):
        before, after = row
        expected = tokens(make_driver(after, linear=linear))
        driver = make_driver(before, linear=linear)
        assert tokens(driver) != expected
        for version in (1, 2):
            assert take(driver, tensors_of(after), version).error is None
            assert tokens(driver) == expected
        assert staged_in(driver).missing() == list(driver.worker.weights.shapes)

    rows = [
        (checkpoint(tied=True, seed=1), checkpoint(tied=True, seed=2)),
        (checkpoint(seed=1), checkpoint(seed=2, shards=3)),
        (checkpoint("qwen2", seed=1), checkpoint("qwen2", seed=2)),
        (checkpoint(seed=1), checkpoint(seed=2, dtype=torch.bfloat16)),
    ]
    check_each(rows, check)


def test_padding_of_the_vocabulary_is_cut(checkpoint, tmp_path):
    paths = []
    for seed in (1, 2):
        paths.append(tmp_path / str(seed))
        shutil.copytree(checkpoint(seed=seed, tied=True), paths[-1])
        edit_json(paths[-1] / "config.json", vocab_size=VOCAB_SIZE - 5)
    driver = make_driver(paths[0])
    assert take(driver, tensors_of(paths[1])).error is None
    assert tokens(driver) == tokens(make_driver(paths[1]))


def test_an_update_that_lacks_a_tensor_changes_nothing(checkpoint):
    driver = make_driver(checkpoint(seed=1))
    expected = tokens(driver)
    tensors = tensors_of(checkpoint(seed=2))
    last = tensors.pop("model.norm.weight")
    answer = take(driver, tensors)
    assert answer.error == "these tensors have not come: model.norm.weight"
    assert tokens(driver) == expected
    staged = staged_in(driver)
    staged.put("model.norm.weight", last, staged.begin(set(), anew=False))
    assert driver.control(UpdateWeights(1, (), (), True)).error is None
    assert tokens(driver) == tokens(make_driver(checkpoint(seed=2)))


def test_a_tensor_that_comes_again_begins_another_update(checkpoint):
    driver = make_driver(checkpoint(seed=1))
    staged = staged_in(driver)
    tensors = tensors_of(checkpoint(seed=2))
    names = list(tensors)
    for name in names[:3]:
        staged.put(name, tensors[name], staged.begin({name}, anew=False))
    assert set(names[:3]).isdisjoint(staged.missing())
    staged.begin({names[1], names[5]}, anew=False)
    assert staged.missing() == list(driver.worker.weights.shapes)
    update = staged.begin({names[1]}, anew=False)
    staged.put(names[1], tensors[names[1]], update)
    staged.begin({names[7]}, anew=True)
    assert names[1] in staged.missing()
    staged.put(names[2], tensors[names[2]], update)  # it comes too late
    assert names[2] in staged.missing()


def test_a_tied_head_may_come_if_it_is_the_embedding(checkpoint):
    tensors = tensors_of(checkpoint(seed=2, tied=True))
    tensors.pop(HEAD, None)
    expected = tokens(make_driver(checkpoint(seed=2, tied=True)))
    for name in (HEAD, EMBEDDING):
        driver = make_driver(checkpoint(seed=1, tied=True))
        both = {**tensors, HEAD: tensors[EMBEDDING]}
        only = {**both}
        del only[EMBEDDING if name == HEAD else HEAD]
        for each in (both, only):
            assert take(driver, each, driver.worker._next_number + 1).error is None
            assert tokens(driver) == expected
    with pytest.raises(ModelError, match=r"differs from model\.embed_tokens\.weight"):
        take(driver, {**tensors, HEAD: tensors[EMBEDDING] + 1}, 100)


def test_released_weights_of_a_trainer_wait_for_an_update(checkpoint):
    driver = make_driver(checkpoint(seed=1))
    tensors = tensors_of(checkpoint(seed=2))
    assert take(driver, tensors).error is None
    driver.control(ReleaseMemory(weights=True, kv_cache=False))
    assert not driver.control(RestoreMemory(weights=True, kv_cache=False)).weights_ready
    answer = take(driver, tensors, 2)
    assert (answer.error, answer.weights_ready) == (None, True)
    assert tokens(driver) == tokens(make_driver(checkpoint(seed=2)))


def test_a_worker_without_a_way_to_report_joins_no_group(checkpoint):
    driver = make_driver(checkpoint())
    join = JoinWeightsGroup("g", "127.0.0.1", 1, 1, 2, "gloo", 1.0)
    assert "joins no group" in driver.control(join).error
    receive = ReceiveWeights("g", ("a",), ("float32",), ((1,),), False, True, 1.0)
    assert "is in no group 'g'" in driver.control(receive).error
    assert driver.control(LeaveWeightsGroup("g")).error is None


def test_nccl_without_a_gpu_is_refused_by_name(checkpoint):
    driver = make_driver(checkpoint())
    driver.worker._controls._groups._report = print
    join = JoinWeightsGroup("g", "127.0.0.1", 1, 1, 2, "nccl", 1.0)
    assert "backend is nccl, which needs CUDA devices" in driver.control(join).error
