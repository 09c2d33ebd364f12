"""Cartridges of every published layout become the file that workers read, with the same numbers."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os

import pytest
import torch
from cartridge_files import (
    HEAD_DIM,
    NUM_HEADS,
    NUM_LAYERS,
    fields,
    own_tensors,
    read_here,
    write_own,
)
from rows import check_each
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tokasaurus.cartridge_file import CartridgeFile
from tokasaurus.cartridges import reading
from tokasaurus.cartridges.reading import inspect_cartridge, read_cartridge
from tokasaurus.cartridges.specification import ModelShape
from tokasaurus.errors import EngineError, RequestError, StorageFull


def read(source, target, companion=None):
    return asyncio.run(read_cartridge(source, target, companion=companion))


def expected(saved):
    """Our tensors of what a trainer saved, by torch: frozen positions first."""
    made = {}
    for kind in ("keys", "values"):
        lists = [saved.get(f"{part}_{kind}") or [] for part in ("fixed", "frozen", "trainable")]
        for layer in range(NUM_LAYERS):
            parts = [each[layer].detach() for each in lists if len(each)]
            made[f"{kind}.{layer}"] = (
                torch.cat(parts, 2)[0].transpose(0, 1).contiguous().contiguous()
            )
    return made


def parameters(saved):
    return {
        name: torch.nn.ParameterList([torch.nn.Parameter(each) for each in value])
        for name, value in saved.items()
    }


def equal(found, wanted):
    return found.keys() == wanted.keys() and all(
        found[name].dtype == each.dtype and torch.equal(found[name], each)
        for name, each in wanted.items()
    )


def test_every_published_layout_is_read(tmp_path):
    views = torch.randn(1, NUM_HEADS, 20, HEAD_DIM * NUM_LAYERS, dtype=torch.float32)
    layers = [views[:, :, 3:10, i * HEAD_DIM : (i + 1) * HEAD_DIM] for i in range(NUM_LAYERS)]
    rows = [
        ("newer", parameters(fields()), 1),
        ("older", parameters(fields(name="fixed")), 1),
        ("lists", fields(), 1),
        ("tuples", {name: tuple(each) for name, each in fields().items()}, 1),
        ("F16", fields(dtype=torch.float16), 1),
        ("F32", parameters(fields(dtype=torch.float32)), 1),
        ("nothing frozen", {**fields(), "frozen_keys": [], "frozen_values": []}, 0),
        (
            "an empty list of parameters",
            parameters({**fields(), "frozen_keys": [], "frozen_values": []}),
            0,
        ),
        ("None", {**fields(), "frozen_keys": None, "frozen_values": None}, 0),
        ("only trainable", {n: v for n, v in fields().items() if "trainable" in n}, 0),
        ("no frozen positions", fields(0), 0),
        ("many frozen", parameters(fields(33, 64)), 33),
        ("one position", fields(0, 1), 0),
        ("parts of larger tensors", {"trainable_keys": layers, "trainable_values": layers}, 0),
    ]

    def check(row):
        name, saved, num_frozen = row
        torch.save(saved, tmp_path / name)
        wanted = expected(saved)
        metadata = read_here(tmp_path / name, tmp_path / "target").metadata
        assert equal(load_file(tmp_path / "target"), wanted)
        assert metadata.num_frozen == num_frozen
        assert metadata.num_tokens == len(wanted["keys.0"])
        assert metadata.shape == ModelShape(NUM_LAYERS, NUM_HEADS, HEAD_DIM)
        assert metadata.num_bytes == sum(each.nbytes for each in wanted.values())
        with CartridgeFile(tmp_path / "target") as file:
            file.check(NUM_LAYERS, NUM_HEADS, HEAD_DIM)

    check_each(rows, check)


def test_the_digest_is_of_the_tensors_and_not_of_the_file(tmp_path):
    saved = parameters(fields(2, 5))
    torch.save(saved, tmp_path / "a.pt")
    torch.save(fields(2, 5, name="fixed"), tmp_path / "b.pt")
    save_file(expected(saved), tmp_path / "c.safetensors")
    digests = {
        name: read_here(tmp_path / name, tmp_path / f"{name}.out").metadata.digest
        for name in ("a.pt", "b.pt", "c.safetensors")
    }
    assert len(set(digests.values())) == 1
    again = read(tmp_path / "a.pt.out", tmp_path / "again")
    assert again.digest == digests["a.pt"]
    assert (tmp_path / "again").read_bytes() == (tmp_path / "a.pt.out").read_bytes()
    assert again.num_frozen == 2

    by_hand = hashlib.sha256()
    for layer in range(NUM_LAYERS):
        for kind in ("keys", "values"):
            tensor = expected(saved)[f"{kind}.{layer}"]
            by_hand.update(f"{kind}.{layer} BF16 {list(tensor.shape)}\n".encode())
            by_hand.update(tensor.contiguous().view(torch.int16).numpy().tobytes())
    assert digests["a.pt"] == by_hand.hexdigest()

    changed = fields(2, 5)
    changed["trainable_values"][1][0, 0, 4, 3] += 1
    torch.save(changed, tmp_path / "d.pt")
    assert read_here(tmp_path / "d.pt").metadata.digest != digests["a.pt"]


def test_a_file_of_several_dtypes_becomes_f32_without_loss(tmp_path):
    saved = {**fields(dtype=torch.float16), "frozen_keys": fields()["frozen_keys"]}
    torch.save(saved, tmp_path / "file")
    metadata = read_here(tmp_path / "file", tmp_path / "target").metadata
    wanted = {name: each.float() for name, each in expected(saved).items()}
    assert equal(load_file(tmp_path / "target"), wanted)
    assert metadata.dtype == "F32"


def test_a_large_file_is_read_in_pieces(tmp_path):
    """More positions than are copied at once: each is where it belongs."""
    saved = {
        name: [torch.randn(1, 8, 20_000, 128).bfloat16()]
        for name in ("trainable_keys", "trainable_values")
    }
    torch.save(saved, tmp_path / "file")
    metadata = read_here(tmp_path / "file", tmp_path / "target").metadata
    assert metadata.num_bytes == 2 * 8 * 20_000 * 128 * 2
    found = load_file(tmp_path / "target")
    for kind in ("keys", "values"):
        assert torch.equal(found[f"{kind}.0"], saved[f"trainable_{kind}"][0][0].transpose(0, 1))


def test_metadata_of_ours_are_kept(tmp_path):
    said = {
        "format": "tokasaurus cartridge 1",
        "model": "org/model é",
        "rope": "a" * 64,
        "tokenizer": "b" * 64,
        "num_frozen": "3",
    }
    write_own(tmp_path / "file", said)
    metadata = read(tmp_path / "file", tmp_path / "target")
    assert metadata.shape == ModelShape(NUM_LAYERS, NUM_HEADS, HEAD_DIM, "org/model é", "a" * 64)
    assert (metadata.tokenizer, metadata.num_frozen) == ("b" * 64, 3)
    with safe_open(tmp_path / "target", "pt") as file:
        assert file.metadata() == {**said, "digest": metadata.digest}
    again = asyncio.run(inspect_cartridge(tmp_path / "target"))
    assert (again.layout, again.metadata) == ("safetensors", metadata)


def test_metadata_of_other_programs_are_not_believed(tmp_path):
    write_own(tmp_path / "file", {"format": "pt", "model": "x", "num_frozen": "many"})
    assert read(tmp_path / "file", tmp_path / "target").shape.name == ""


def test_the_companion_says_which_model_it_is_for(tmp_path):
    write_own(tmp_path / "file")
    write_own(tmp_path / "own", {"format": "tokasaurus cartridge 1", "model": "its/own"})
    marker = tmp_path / "marker"
    rows = [
        ("", "file", ""),
        ("other: 1", "file", ""),
        ("model: 3", "file", ""),
        ("model: {pretrained_model_name_or_path: org/name}", "file", "org/name"),
        ("model: {value: {pretrained_model_name_or_path: org/name}}", "file", "org/name"),
        ("model: {pretrained_model_name_or_path: {value: org/name}}", "file", "org/name"),
        ("model: {pretrained_model_name_or_path: org/name}", "own", "its/own"),
        (
            "kv_cache_initializer: {max_tokens: 3, shape: !!python/tuple [1, 2]}\n"
            f"x: !!python/object/apply:os.system ['touch {marker}']\n"
            "model: !whatever {pretrained_model_name_or_path: !!python/unicode org/name}",
            "file",
            "org/name",
        ),
    ]

    def check(row):
        text, name, model = row
        (tmp_path / "config.yaml").write_text(text)
        metadata = read_here(tmp_path / name, companion=tmp_path / "config.yaml").metadata
        assert metadata.shape.name == model
        assert not marker.exists()

    check_each(rows, check)


def test_the_reading_process_gets_no_secrets_and_no_descriptors(tmp_path, monkeypatch):
    save_file(own_tensors(), tmp_path / "file")
    (tmp_path / "teller.py").write_text(
        "import json, os, sys\n"
        f"json.dump([dict(os.environ), os.listdir('/proc/self/fd'), os.getcwd(), sys.argv],"
        f" open({str(tmp_path / 'told')!r}, 'w'))\n"
    )
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY", "OVERRIDES"):
        monkeypatch.setenv(name, "a-secret")
    monkeypatch.setenv("PYTHONPATH", f"{os.environ.get('PYTHONPATH', '')}:{tmp_path}")
    monkeypatch.setattr(reading, "_PROGRAM", "teller")
    kept_open = open(tmp_path / "file", "rb")  # noqa: SIM115
    os.set_inheritable(kept_open.fileno(), True)
    with kept_open, pytest.raises(RequestError):
        read(tmp_path / "file", tmp_path / "target")
    environment, descriptors, directory, arguments = json.loads((tmp_path / "told").read_text())
    assert "a-secret" not in str(environment)
    # Standard input, output and error, the source, the target, and the listing itself.
    assert len(descriptors) == 6
    assert directory == "/"
    assert str(tmp_path / "file") not in " ".join(arguments[1:])


def test_a_process_that_lies_is_not_believed(tmp_path, monkeypatch):
    """As if a hostile file had taken over the process that reads it."""
    save_file(own_tensors(), tmp_path / "file")
    honest = read(tmp_path / "file", tmp_path / "honest")
    (tmp_path / "liar.py").write_text(
        "import json, os, sys\n"
        "job = json.loads(sys.argv[1])\n"
        f"os.write(job['target'], open({str(tmp_path / 'written')!r}, 'rb').read())\n"
        f"print(open({str(tmp_path / 'said')!r}).read())\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{os.environ.get('PYTHONPATH', '')}:{tmp_path}")
    monkeypatch.setattr(reading, "_PROGRAM", "liar")
    plain = dataclasses.asdict(honest)
    good = (tmp_path / "honest").read_bytes()
    rows = [
        ("the truth", good, plain, None),
        ("another number of positions", good, {**plain, "num_tokens": 4}, "cannot be read"),
        ("another shape", good, {**plain, "shape": {**plain["shape"], "num_layers": 3}}, "cannot"),
        ("no digest", good, {**plain, "digest": "../../x"}, "the file cannot be read"),
        ("no file", b"", plain, "the file cannot be read"),
        ("half a file", good[:-1], plain, "the file cannot be read"),
        ("a huge number", good, {**plain, "num_tokens": 1 << 80}, "the file cannot be read"),
        ("fields of other types", good, {**plain, "num_bytes": "x"}, "the file cannot be read"),
    ]

    def check(row):
        _, written, metadata, says = row
        (tmp_path / "written").write_bytes(written)
        (tmp_path / "said").write_text(json.dumps({"metadata": metadata, "layout": "x"}))
        (tmp_path / "target").unlink(missing_ok=True)
        if says is None:
            assert read(tmp_path / "file", tmp_path / "target") == honest
            return
        with pytest.raises(RequestError, match=says):
            read(tmp_path / "file", tmp_path / "target")
        assert not (tmp_path / "target").exists()

    check_each(rows, check)


def test_a_disk_that_refuses_is_an_error_of_the_engine(tmp_path, monkeypatch):
    save_file(own_tensors(), tmp_path / "file")
    with pytest.raises(EngineError, match="cannot be stored: No such file"):
        read(tmp_path / "file", tmp_path / "missing" / "target")
    # The only disk that is surely full.
    monkeypatch.setattr(reading, "new_file", _full_disk)
    with pytest.raises(StorageFull, match="cannot be stored: No space left on device; delete"):
        read(tmp_path / "file", tmp_path / "target")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


class _full_disk:  # noqa: N801
    def __init__(self, target):
        self._path = target

    def __enter__(self):
        self._file = open("/dev/full", "r+b", buffering=0)
        return self._file, self._path

    def __exit__(self, *raised):
        self._file.close()


def test_a_new_version_replaces_the_file_at_once(tmp_path):
    """A worker that has the former one open goes on reading it."""
    save_file(own_tensors(), tmp_path / "file")
    read(tmp_path / "file", tmp_path / "target")
    with CartridgeFile(tmp_path / "target") as former:
        save_file(own_tensors(11), tmp_path / "file")
        assert read(tmp_path / "file", tmp_path / "target").num_tokens == 11
        former.check_unchanged()
        assert former.num_tokens == 5
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "target"]


def test_several_files_are_read_at_once(tmp_path):
    for number in range(4):
        save_file(own_tensors(number + 1), tmp_path / str(number))

    async def run():
        return await asyncio.gather(
            *(read_cartridge(tmp_path / str(i), tmp_path / f"t{i}") for i in range(4))
        )

    assert [each.num_tokens for each in asyncio.run(run())] == [1, 2, 3, 4]
