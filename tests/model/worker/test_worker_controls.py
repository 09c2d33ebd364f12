"""Controls between batches: new weights, memory that is released and restored, cartridges."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from checkpoints import VOCAB_SIZE, edit_json
from rows import check_each, named
from safetensors.torch import load_file, save_file
from worker_driver import Enter, generate, make_driver, worker_config
from worker_script import contents, ids, ints, load_vocabulary, run, script

import tokasaurus.demo
from tokasaurus.checkpoint_files import checkpoint_files
from tokasaurus.errors import EngineError, ProtocolError
from tokasaurus.model.weights.weight_files import WeightFiles
from tokasaurus.model.weights.weights import Weights
from tokasaurus.model.worker.worker import Worker
from tokasaurus.protocol.commands import (
    Control,
    ControlDone,
    ReleaseMemory,
    RestoreMemory,
    UpdateWeights,
    WriteCartridge,
)
from tokasaurus.protocol.messages import ForwardResult

DEMO = Path(tokasaurus.demo.__file__).parent / "model"
QUERY = "model.layers.1.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
PROMPT = list(range(3, 40))
BOTH = {"weights": True, "kv_cache": True}


def update_from(directory, version=1):
    return UpdateWeights(version, tuple(map(str, checkpoint_files(directory))))


def tokens(driver, slot=0):
    return generate(driver, PROMPT, 12, slot=slot)


def done(driver, action, *, weights_ready=True):
    """Carries out a control that must not fail."""
    answer = driver.control(action)
    assert (answer.error, answer.weights_ready) == (None, weights_ready)


def save_cartridge(path, num_tokens, *, num_layers=3, num_heads=2, head_dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens, num_heads, head_dim)
    tensors = {
        f"{kind}.{layer}": torch.randn(shape, generator=generator)
        for layer in range(num_layers)
        for kind in ("keys", "values")
    }
    save_file(tensors, path)
    return tensors


@pytest.fixture
def noisy_demo(tmp_path) -> Path:
    """The bundled model with noise on its weights."""
    path = tmp_path / "noisy"
    shutil.copytree(DEMO, path)
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(path / "model.safetensors")
    for tensor in tensors.values():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor += (noise * 0.1 * tensor.float().std()).to(tensor.dtype)
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.mark.parametrize("linear", ["plain", "packed"])
def test_controls_among_batches_in_flight_keep_order_and_tokens(checkpoint, tmp_path, linear):
    """Sequences with and without grammars go on through controls that change none of their data."""
    path = checkpoint("llama", tied=True)
    config = worker_config(path, num_slots=12, num_pages=200, linear=linear)
    batches = script(config)
    expected = run(Worker(config, load_vocabulary), batches, 1)
    used = {int(page) for batch in batches for page in batch.table_pages}
    free = ints(*sorted(set(range(200)) - used)[:2])
    save_cartridge(tmp_path / "cartridge", 20)
    actions = [
        update_from(path),
        UpdateWeights(2, (str(tmp_path / "absent"),)),
        WriteCartridge((str(tmp_path / "cartridge"),), 20, free),
        WriteCartridge((str(tmp_path / "absent"),), 20, free),
        ReleaseMemory(weights=True, kv_cache=False),
        RestoreMemory(**BOTH),
    ]
    messages, answers = [], []
    for batch in batches:
        for action in actions:
            messages.append(Control(len(messages), action))
            answers.append(len(messages))
        messages.append(msgspec.structs.replace(batch, number=len(messages)))
    for in_flight in (1, 3, len(messages) + 1):
        results = run(Worker(config, load_vocabulary), messages, in_flight)
        with named(f"{in_flight} in flight"):
            assert [each.number for each in results] == list(range(len(messages)))
            drawn = [each for each in results if isinstance(each, ForwardResult)]
            assert [contents(msgspec.structs.replace(each, number=0)) for each in drawn] == [
                contents(msgspec.structs.replace(each, number=0)) for each in expected
            ]
            controls = [each for each in results if isinstance(each, ControlDone)]
            kinds = [(each.error is not None, each.weights_ready) for each in controls]
            one = [(False, True), (True, True), (False, True), (True, True)]
            assert kinds == [*one, (False, False), (False, True)] * len(batches)


@pytest.mark.parametrize("linear", ["plain", "packed"])
def test_an_update_gives_what_a_fresh_worker_gives(checkpoint, noisy_demo, linear):
    def check(row):
        before, after = row
        expected = [tokens(make_driver(path, linear=linear)) for path in (before, after)]
        assert expected[0] != expected[1]
        driver = make_driver(before, linear=linear)
        assert tokens(driver) == expected[0]
        done(driver, update_from(after))
        assert tokens(driver) == expected[1]
        done(driver, update_from(before, 2))
        assert tokens(driver) == expected[0]

    rows = [
        (DEMO, noisy_demo),
        (checkpoint(tied=True, seed=1), checkpoint(tied=True, seed=2)),
        (checkpoint(seed=1), checkpoint(seed=2, shards=3)),
        (checkpoint("qwen2", seed=1), checkpoint("qwen2", seed=2)),
        (checkpoint("qwen3", seed=1, tied=True), checkpoint("qwen3", seed=2, tied=True)),
        (checkpoint(seed=1), checkpoint(seed=2, dtype=torch.bfloat16)),
    ]
    check_each(rows, check)


@pytest.mark.parametrize("linear", ["plain", "packed"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_update_cuts_the_padding_of_the_vocabulary(checkpoint, tmp_path, linear, tied):
    paths = []
    for seed in (1, 2):
        paths.append(tmp_path / str(seed))
        shutil.copytree(checkpoint(seed=seed, tied=tied), paths[-1])
        edit_json(paths[-1] / "config.json", vocab_size=VOCAB_SIZE - 5)
    driver = make_driver(paths[0], linear=linear)
    done(driver, update_from(paths[1]))
    assert tokens(driver) == tokens(make_driver(paths[1], linear=linear))


def test_checksums_are_compared_in_the_order_of_the_files(checkpoint):
    path = checkpoint(seed=2, shards=3)
    action = update_from(path)
    sums = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in action.files]
    driver = make_driver(checkpoint(seed=1))
    done(driver, msgspec.structs.replace(action, checksums=(sums[0].upper(), *sums[1:])))
    assert tokens(driver) == tokens(make_driver(path))
    wrong = msgspec.structs.replace(action, checksums=(sums[1], sums[0], *sums[2:]))
    assert f"{action.files[0]} has SHA-256 {sums[0]}, not {sums[1]}" in driver.control(wrong).error


def bad_updates(directory, whole):
    """Name, files, checksums, and what the error says, of updates that must be refused.

    Args:
        directory: to write to.
        whole: a checkpoint's file, which fits the model.
    """
    tensors = load_file(whole)
    data = whole.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    path = str(whole)

    def written(name, content):
        file = directory / f"{name}.safetensors"
        if isinstance(content, dict):
            save_file(content, file)
        else:
            file.write_bytes(content)
        return str(file)

    def changed(name, **changes):
        return written(name, {**tensors, **changes})

    without = {name: tensor for name, tensor in tensors.items() if name != QUERY}
    (directory / "directory").mkdir()
    return [
        ("no files", (), (), "lacks tensors: model.embed_tokens.weight"),
        ("absent", (str(directory / "absent"),), (), "absent cannot be read: No such file"),
        ("one absent", (path, str(directory / "absent")), (), "absent cannot be read"),
        ("a directory", (str(directory / "directory"),), (), "directory is not a file"),
        ("empty", (written("empty", b""),), (), r"empty\.safetensors is damaged or incomplete"),
        ("cut", (written("cut", data[:-100]),), (), r"cut\.safetensors is damaged .*ends at byte"),
        ("longer", (written("longer", data + b"!"),), (), r"longer\.safetensors is damaged"),
        ("no header", (written("text", b"no weights at all"),), (), r"text\.safetensors is dam"),
        ("missing", (written("missing", without),), (), f"update to version 1 lacks .*: {QUERY}"),
        ("unknown", (changed("unknown", x=torch.ones(1)),), (), "does not use: x"),
        (
            "shape",
            (changed("shape", **{QUERY: torch.ones(63, 64)}),),
            (),
            rf"shape\.safetensors: tensor {QUERY} has shape \[63, 64\]; config.json asks",
        ),
        ("scalar", (changed("scalar", **{QUERY: torch.tensor(1.0)}),), (), r"has shape \[\]"),
        ("scalar ids", (changed("ids", **{EMBEDDING: torch.tensor(1.0)}),), (), r"shape \[\]"),
        (
            "too few ids",
            (changed("few", **{EMBEDDING: tensors[EMBEDDING][:-1].clone()}),),
            (),
            rf"{EMBEDDING} has shape \[263, 64\]",
        ),
        (
            "too many rows",
            (changed("many", **{QUERY: torch.ones(65, 64)}),),
            (),
            rf"{QUERY} has shape \[65, 64\]",
        ),
        (
            "integers",
            (changed("int8", **{QUERY: tensors[QUERY].to(torch.int8)}),),
            (),
            rf"int8\.safetensors: tensor {QUERY} is torch\.int8: quantized",
        ),
        (
            "a dtype of the future",
            (written("future", data.replace(b'"dtype":"F32"', b'"dtype":"F4x"', 1)),),
            (),
            r"future\.safetensors: tensor .* is F4x: quantized",
        ),
        ("the same file twice", (path, path), (), "is in .*safetensors and in .*; keep one"),
        (
            "a tensor in two files",
            (path, written("again", {QUERY: tensors[QUERY]})),
            (),
            rf"tensor {QUERY} is in .* and in .*again\.safetensors; keep one",
        ),
        ("checksum", (path,), ("0" * 64,), f"has SHA-256 {digest}, not 0000"),
        ("no checksum at all", (path,), ("oops",), "'oops', the checksum of .*, is not a SHA-256"),
        ("too many checksums", (path,), (digest, digest), "has 2 checksums for 1 files"),
        ("an impossible path", ("a\0b",), (), "cannot be read"),
    ]


@pytest.mark.parametrize("linear", ["plain", "packed"])
def test_an_update_that_is_refused_changes_nothing(checkpoint, tmp_path, linear):
    driver = make_driver(checkpoint(seed=1), linear=linear)
    other = checkpoint(seed=2)
    expected = tokens(driver)

    def check(row):
        _, files, checksums, message = row
        answer = driver.control(UpdateWeights(1, files, checksums))
        assert answer.error is not None
        assert re.search(message, answer.error), answer.error
        assert answer.weights_ready
        assert tokens(driver) == expected

    check_each(bad_updates(tmp_path, other / "model.safetensors"), check)
    assert driver.worker.weights.missing() == list(driver.worker.weights.shapes)
    done(driver, update_from(other))
    assert tokens(driver) == tokens(make_driver(other, linear=linear))


def test_a_refusal_does_not_disturb_a_running_sequence(checkpoint, tmp_path):
    expected, _ = generate(make_driver(checkpoint()), PROMPT, 6)
    driver = make_driver(checkpoint())
    driver.start(0)
    drawn = [driver.step(prefill=[Enter(0, PROMPT)]).token_ids[0]]
    for _ in range(5):
        assert driver.control(UpdateWeights(1, (str(tmp_path),))).error is not None
        drawn.append(driver.step(decode=[0]).token_ids[0])
    assert drawn == expected


def test_a_file_that_is_replaced_after_the_check_is_read_as_it_was_checked(
    checkpoint, tmp_path, monkeypatch
):
    path = tmp_path / "model.safetensors"
    shutil.copy(checkpoint(seed=2) / "model.safetensors", path)
    read = WeightFiles.tensors

    def replace_first(files):
        shutil.copy(checkpoint(seed=3) / "model.safetensors", tmp_path / "new")
        os.replace(tmp_path / "new", path)
        return read(files)

    driver = make_driver(checkpoint(seed=1))
    monkeypatch.setattr(WeightFiles, "tensors", replace_first)
    done(driver, UpdateWeights(1, (str(path),)))
    monkeypatch.undo()
    assert tokens(driver) == tokens(make_driver(checkpoint(seed=2)))


def overwritten(path):
    with open(path, "r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"!" * 10)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def test_a_file_that_is_written_to_while_it_is_read_ends_the_worker(
    checkpoint, tmp_path, monkeypatch
):
    path = tmp_path / "model.safetensors"
    fill = Weights.fill

    def check(change):
        shutil.copy(checkpoint(seed=2) / "model.safetensors", path)
        filled = []

        def fill_and_change(weights, name, tensor):
            filled.append(name)
            fill(weights, name, tensor)
            if len(filled) == 3:
                change(path)

        driver = make_driver(checkpoint(seed=1))
        monkeypatch.setattr(Weights, "fill", fill_and_change)
        with pytest.raises(
            EngineError,
            match=r"control 0 \(UpdateWeights\): .*the weights are half written.*"
            r"model\.safetensors has changed while it was read.*start it again",
        ):
            driver.control(UpdateWeights(1, (str(path),)))
        monkeypatch.undo()
        driver.start(0)
        with pytest.raises(ProtocolError, match="half written"):
            driver.step(prefill=[Enter(0, PROMPT)])

    check_each([overwritten, cut], check)


def test_a_file_that_is_written_to_during_the_check_is_refused(checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    shutil.copy(checkpoint(seed=2) / "model.safetensors", path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    check_sums = WeightFiles.check_sums

    def check_and_change(files, checksums):
        check_sums(files, checksums)
        overwritten(path)

    driver = make_driver(checkpoint(seed=1))
    expected = tokens(driver)
    monkeypatch.setattr(WeightFiles, "check_sums", check_and_change)
    answer = driver.control(UpdateWeights(1, (str(path),), (digest,)))
    assert "has changed while it was read; write new weights to a new file" in answer.error
    assert tokens(driver) == expected


@pytest.mark.parametrize("linear", ["plain", "packed"])
def test_the_same_tokens_come_after_memory_was_released_and_restored(checkpoint, linear):
    def check(row):
        architecture, tied, weights, kv_cache = row
        driver = make_driver(checkpoint(architecture, tied=tied), linear=linear)
        expected = tokens(driver)
        cache = driver.worker._cache
        objects = [id(tensor) for tensor in cache.keys + cache.values]
        what = {"weights": weights, "kv_cache": kv_cache}
        done(driver, ReleaseMemory(**what), weights_ready=not weights)
        if kv_cache:
            assert all(t.untyped_storage().nbytes() < 8 for t in cache.keys + cache.values)
        driver.start(0)
        if weights or kv_cache:
            with pytest.raises(ProtocolError, match=r"the (weights|KV cache) (is|are) released"):
                driver.step(prefill=[Enter(0, PROMPT)])
        # Again, which changes nothing.
        done(driver, ReleaseMemory(**what), weights_ready=not weights)
        done(driver, RestoreMemory(**BOTH))
        done(driver, RestoreMemory(**BOTH))
        assert [id(tensor) for tensor in cache.keys + cache.values] == objects
        assert tokens(driver, slot=1) == expected

    rows = [
        (architecture, tied, weights, kv_cache)
        for architecture, tied in (("llama", True), ("llama", False), ("qwen2", False))
        for weights in (True, False)
        for kv_cache in (True, False)
    ]
    check_each(rows, check)


def test_memory_is_restored_part_by_part(checkpoint):
    driver = make_driver(checkpoint())
    expected = tokens(driver)
    done(driver, ReleaseMemory(**BOTH), weights_ready=False)
    done(driver, RestoreMemory(weights=False, kv_cache=True), weights_ready=False)
    driver.start(0)
    with pytest.raises(ProtocolError, match=r"batch \d+: it comes while the weights are released"):
        driver.step(prefill=[Enter(0, PROMPT)])
    done(driver, RestoreMemory(weights=True, kv_cache=False))
    assert tokens(driver, slot=1) == expected


@pytest.mark.parametrize("linear", ["plain", "packed"])
def test_an_update_restores_released_weights(checkpoint, tmp_path, linear):
    one, other = checkpoint(seed=1, tied=True), checkpoint(seed=2, tied=True)
    driver = make_driver(one, linear=linear)
    done(driver, ReleaseMemory(**BOTH), weights_ready=False)
    refused = driver.control(UpdateWeights(1, (str(tmp_path / "absent"),)))
    assert refused.error is not None
    assert not refused.weights_ready
    done(driver, update_from(other))
    driver.start(0)
    with pytest.raises(ProtocolError, match="while the KV cache is released"):
        driver.step(prefill=[Enter(0, PROMPT)])
    done(driver, RestoreMemory(**BOTH))
    assert tokens(driver, slot=1) == tokens(make_driver(other, linear=linear))


def test_weights_are_restored_from_the_files_of_the_last_update(checkpoint, tmp_path):
    start, first, second = (tmp_path / name for name in ("start", "first", "second"))
    for seed, path in enumerate((start, first, second)):
        shutil.copytree(checkpoint(seed=seed, shards=2), path)
    driver = make_driver(start)
    done(driver, update_from(first))
    # A refused update does not count.
    assert driver.control(UpdateWeights(2, (str(tmp_path),))).error is not None
    done(driver, ReleaseMemory(**BOTH), weights_ready=False)
    done(driver, RestoreMemory(**BOTH))
    expected = tokens(make_driver(first))
    assert tokens(driver) == expected
    # A file is gone, and then it is another.
    done(driver, ReleaseMemory(**BOTH), weights_ready=False)
    gone = checkpoint_files(first)[-1]
    os.rename(gone, tmp_path / "kept")
    done(driver, RestoreMemory(**BOTH), weights_ready=False)
    shutil.copy(second / gone.name, gone)
    done(driver, RestoreMemory(**BOTH), weights_ready=False)
    # It is back, unchanged.
    os.replace(tmp_path / "kept", gone)
    done(driver, RestoreMemory(**BOTH))
    assert tokens(driver) == expected
    # Without it, an update helps.
    done(driver, ReleaseMemory(weights=True, kv_cache=False), weights_ready=False)
    shutil.rmtree(first)
    done(driver, RestoreMemory(**BOTH), weights_ready=False)
    done(driver, update_from(second, 2))
    assert tokens(driver) == tokens(make_driver(second))


def test_random_weights_are_restored(checkpoint):
    driver = make_driver(checkpoint("qwen2"), load_format="dummy")
    expected = tokens(driver)
    done(driver, ReleaseMemory(**BOTH), weights_ready=False)
    done(driver, RestoreMemory(**BOTH))
    assert tokens(driver) == expected


def test_a_runner_is_told_when_tensors_may_have_moved(checkpoint, monkeypatch):
    driver = make_driver(checkpoint(seed=1))
    calls = []
    runner = driver.worker._runner
    monkeypatch.setattr(runner, "addresses_changed", lambda: calls.append("changed"))

    def check(row):
        action, told = row
        driver.control(action)
        assert bool(calls) == told
        calls.clear()

    rows = [
        (update_from(checkpoint(seed=2)), True),
        (UpdateWeights(2, ("absent",)), False),
        (ReleaseMemory(weights=False, kv_cache=False), False),
        (ReleaseMemory(weights=False, kv_cache=True), True),
        (RestoreMemory(**BOTH), False),
        (ReleaseMemory(weights=True, kv_cache=False), True),
        (RestoreMemory(**BOTH), True),
    ]
    check_each(rows, check)


@pytest.mark.parametrize("attention", ["compiled", "reference"])
def test_a_cartridge_stands_for_the_tokens_that_made_it(checkpoint, tmp_path, attention):
    """Keys and values of a prompt's first tokens, taken from one worker, serve another one."""
    prompt = ids(60, 5)

    def check(num_tokens):
        source = make_driver(checkpoint("qwen3"), attention=attention)
        expected = generate(source, prompt, 8)
        pages = source.held[0]
        cache = source.worker._cache
        names = [("keys", cache.keys), ("values", cache.values)]
        tensors = {
            f"{kind}.{layer}": tensor[pages].transpose(1, 2).flatten(0, 1)[:num_tokens].clone()
            for kind, layers in names
            for layer, tensor in enumerate(layers)
        }
        path = tmp_path / "cartridge"
        save_file(tensors, path)
        driver = make_driver(checkpoint("qwen3"), attention=attention, page_size=8)
        taken = ints(*driver.free[: -(-num_tokens // 8)])
        done(driver, WriteCartridge((str(path),), num_tokens, taken))
        driver.start(0, num_logprobs=0)
        # The slot's first pages are those.
        result = driver.step(prefill=[Enter(0, prompt[num_tokens:], num_tokens)])
        drawn, logprobs = [int(result.token_ids[0])], [float(result.logprobs[0])]
        for _ in range(7):
            result = driver.step(decode=[0])
            drawn.append(int(result.token_ids[0]))
            logprobs.append(float(result.logprobs[0]))
        assert drawn == expected[0]
        assert logprobs == pytest.approx(expected[1], abs=1e-5)

    check_each([1, 7, 8, 9, 21, 59], check)


def test_a_cartridge_is_rounded_to_the_dtype_of_the_cache(checkpoint, tmp_path):
    tensors = save_cartridge(tmp_path / "cartridge", 20)
    driver = make_driver(checkpoint(dtype=torch.bfloat16), dtype="bfloat16")
    cache = driver.worker._cache
    for tensor in cache.keys + cache.values:
        tensor.fill_(7)
    done(driver, WriteCartridge((str(tmp_path / "cartridge"),), 20, ints(9, 4)))
    for kind, layers in (("keys", cache.keys), ("values", cache.values)):
        for layer, tensor in enumerate(layers):
            written = tensor[[9, 4]].transpose(1, 2).flatten(0, 1)
            assert torch.equal(written[:20], tensors[f"{kind}.{layer}"].to(torch.bfloat16))
            assert (written[20:] == 7).all()
            others = [page for page in range(len(tensor)) if page not in (4, 9)]
            assert (tensor[others] == 7).all()


def test_files_of_a_cartridge_are_written_one_behind_the_other(checkpoint, tmp_path):
    sizes = {"b": 7, "a": 20, "c": 3}
    parts = [save_cartridge(tmp_path / name, size, seed=size) for name, size in sizes.items()]
    driver = make_driver(checkpoint())
    paths = tuple(str(tmp_path / name) for name in sizes)
    done(driver, WriteCartridge(paths, 30, ints(9, 4)))
    cache = driver.worker._cache
    for kind, layers in (("keys", cache.keys), ("values", cache.values)):
        for layer, tensor in enumerate(layers):
            written = tensor[[9, 4]].transpose(1, 2).flatten(0, 1)[:30]
            assert torch.equal(written, torch.cat([part[f"{kind}.{layer}"] for part in parts]))
    refused = driver.control(WriteCartridge((*paths, str(tmp_path / "absent")), 30, ints(9, 4)))
    assert "absent cannot be read" in refused.error


def test_a_cartridge_that_is_refused_writes_nothing(checkpoint, tmp_path):
    driver = make_driver(checkpoint())
    cache = driver.worker._cache
    for tensor in cache.keys + cache.values:
        tensor.fill_(7)
    save_cartridge(tmp_path / "fits", 20)
    save_cartridge(tmp_path / "layers", 20, num_layers=2)
    save_cartridge(tmp_path / "heads", 20, num_heads=4)
    (tmp_path / "cut").write_bytes((tmp_path / "fits").read_bytes()[:-1])
    torch.save({"keys.0": torch.ones(20, 2, 16)}, tmp_path / "pickle")

    def check(row):
        name, num_tokens, message = row
        pages = ints(*range(-(-num_tokens // 16)))
        answer = driver.control(WriteCartridge((str(tmp_path / name),), num_tokens, pages))
        assert answer.error is not None
        assert message in answer.error
        assert all((tensor == 7).all() for tensor in cache.keys + cache.values)

    rows = [
        ("absent", 20, "absent cannot be read"),
        ("cut", 20, "cut is damaged or incomplete"),
        ("pickle", 20, "pickle is damaged or incomplete"),
        ("layers", 20, "layers lacks tensors: keys.2, values.2; the model has 3 layers"),
        ("heads", 20, "has shape [20, 4, 16]; this model needs [20, 2, 16]"),
        ("fits", 21, "fits: there are 20 tokens, where 21 were announced"),
    ]
    check_each(rows, check)


def test_pages_of_a_cartridge_that_cannot_be_are_a_defect_of_the_manager(checkpoint, tmp_path):
    path = str(tmp_path / "cartridge")
    save_cartridge(path, 20)
    driver = make_driver(checkpoint())

    def check(row):
        pages, message = row
        with pytest.raises(ProtocolError, match=rf"control \d+ \(WriteCartridge\): .*{message}"):
            driver.control(WriteCartridge((path,), 20, ints(*pages)))

    rows = [
        ((1,), "1 pages for 20 tokens"),
        ((1, 2, 3), "3 pages for 20 tokens"),
        ((1, 1), "a page twice"),
        ((0, 64), "range from 0 to 64, the limit is 64"),
        ((-1, 2), "range from -1 to 2"),
    ]
    check_each(rows, check)
    done(driver, ReleaseMemory(weights=False, kv_cache=True))
    check(((1, 2), "while the KV cache is released"))


def test_controls_are_numbered_with_batches(checkpoint):
    driver = make_driver(checkpoint())
    with pytest.raises(ProtocolError, match=r"control 1 \(ReleaseMemory\) came, number 0 was due"):
        driver.worker.submit(Control(1, ReleaseMemory(**BOTH)))
    first = driver.worker.submit(Control(0, RestoreMemory(**BOTH)))
    driver.number = 1
    driver.start(0)
    second = driver.submit(prefill=[Enter(0, PROMPT)])
    with pytest.raises(
        ProtocolError, match=r"batch 1 is collected before control 0 \(RestoreMemory\)"
    ):
        second.collect()
    assert first.is_done
    answer = first.collect()
    assert (answer.number, answer.error, answer.weights_ready) == (0, None, True)
    assert second.collect().number == 1


# Prints the anonymous memory of this process, in bytes, at each stage.
MEMORY = """
import json, sys, threading
from pathlib import Path
from safetensors.torch import save_file
from worker_driver import Driver, generate, worker_config
from tokasaurus.model.weights.dummy import dummy_tensors
from tokasaurus.model.worker.worker import Worker
from tokasaurus.protocol.commands import ReleaseMemory, RestoreMemory, UpdateWeights

directory, linear = Path(sys.argv[1]), sys.argv[2]
config = worker_config(directory, load_format="dummy", linear=linear, num_pages=512)
driver = Driver(Worker(config), config)
weights, cache = driver.worker.weights, driver.worker._cache
for tensor in cache.keys + cache.values:
    tensor.zero_()  # as batches would have touched them
save_file(dict(dummy_tensors(weights.shapes)), directory / "update")

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

def control(action):
    answer = driver.control(action)
    assert answer.error is None, answer.error

def tokens():
    return generate(driver, [3, 4, 5], 4)[0]

def peak_of(action):
    peak, over = [anonymous()], threading.Event()
    def watch():
        while not over.wait(0.001):
            peak.append(anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    control(action)
    over.set()
    thread.join()
    return max(peak)

drawn = [tokens()]
control(ReleaseMemory(False, False))  # what loading has left free
stages = {"start": anonymous()}
control(ReleaseMemory(False, True))
stages["without cache"] = anonymous()
control(ReleaseMemory(True, False))
stages["without both"] = anonymous()
control(RestoreMemory(True, False))
stages["with weights"] = anonymous()
stages["peak of update"] = peak_of(UpdateWeights(1, (str(directory / "update"),)))
stages["updated"] = anonymous()
control(RestoreMemory(True, True))
for tensor in cache.keys + cache.values:
    tensor.zero_()
drawn.append(tokens())
stages["restored"] = anonymous()
assert drawn[0] == drawn[1]
stages["num_parameters"] = weights.num_parameters
stages["cache bytes"] = cache.num_bytes
print(json.dumps(stages))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
@pytest.mark.parametrize("linear", ["plain", "packed"])
def test_released_memory_goes_back_to_the_system(checkpoint, tmp_path, linear):
    shutil.copy(checkpoint() / "config.json", tmp_path)
    edit_json(
        tmp_path / "config.json",
        vocab_size=20_000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    )
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), linear],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert ran.returncode == 0, ran.stderr
    stages = json.loads(ran.stdout.splitlines()[-1])
    weight_bytes = 4 * stages["num_parameters"]
    cache_bytes = stages["cache bytes"]
    assert min(weight_bytes, cache_bytes) > 100e6

    def check(row):
        before, after, expected = row
        change = stages[after] - stages[before]
        assert abs(change - expected) < 0.1 * abs(expected) + 5e6, stages

    rows = [
        ("start", "without cache", -cache_bytes),
        ("without cache", "without both", -weight_bytes),
        ("without both", "with weights", weight_bytes),
        ("with weights", "updated", 0),
        ("updated", "restored", cache_bytes),
        ("start", "restored", 0),
    ]
    check_each(rows, check)
    # No second copy of the weights: the largest matrix, and what the allocator keeps of those that
    # were freed (``_TRIM_BYTES`` of host_memory.py).
    limit = 0.25 * weight_bytes + (64 << 20)
    assert limit < 0.8 * weight_bytes
    assert stages["peak of update"] - stages["with weights"] < limit, stages
