"""Headers of safetensors files: what the format's own library writes and refuses."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
import torch
from rows import check_each
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tokasaurus.errors import ModelError
from tokasaurus.safetensors_file import SafetensorsFile

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def encoded(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


# Name, the file's bytes, and what the error says.
DAMAGED = [
    ("an empty file", b"", "begins at|JSON|header"),
    ("half a length", b"\x01\x00", "header is longer than the file|JSON|Expecting"),
    ("a header without end", encoded({"x": F32})[:20], "header is longer than the file"),
    ("a huge header", (1 << 62).to_bytes(8, "little") + b"{}", "header is longer than the file"),
    ("no JSON", encoded(b"oops"), "Expecting value"),
    ("no UTF-8", encoded(b'{"\xff": 1}'), "can't decode"),
    ("deep JSON", encoded(b'{"a":' * 100_000), "recursion"),
    ("a list", encoded([]), "not a JSON object"),
    ("an entry that is a number", encoded({"x": 1}), "describe tensor x"),
    ("no dtype", encoded({"x": {**F32, "dtype": None}}, bytes(8)), "describe tensor x"),
    ("a negative size", encoded({"x": {**F32, "shape": [-2]}}, bytes(8)), "describe tensor x"),
    ("a size that is no integer", encoded({"x": {**F32, "shape": [2.0]}}, bytes(8)), "describe"),
    ("a size above 64 bits", encoded({"x": {**F32, "shape": [0, 1 << 70]}}), "describe tensor x"),
    ("offsets backwards", encoded({"x": {**F32, "data_offsets": [8, 0]}}, bytes(8)), "describe"),
    ("too few bytes", encoded({"x": F32}, bytes(7)), "tensor x ends at byte"),
    ("too many bytes", encoded({"x": F32}, bytes(9)), "its tensors end at byte"),
    ("another size than the shape's", encoded({"x": {**F32, "shape": [3]}}, bytes(8)), r"\[3\]"),
    (
        "a gap",
        encoded({"x": F32, "y": {**F32, "data_offsets": [9, 17]}}, bytes(17)),
        "tensor y begins at byte",
    ),
    ("an overlap", encoded({"x": F32, "y": F32}, bytes(8)), "tensor y begins at byte"),
    (
        "a name twice",
        encoded(b'{"x": %b, "x": %b}' % ((json.dumps(F32).encode(),) * 2), bytes(8)),
        "names x twice",
    ),
]


def test_damaged_files_are_refused_as_by_the_library(tmp_path):
    path = tmp_path / "damaged.safetensors"

    def check(row):
        name, data, message = row
        path.write_bytes(data)
        with pytest.raises(
            ModelError, match=rf"damaged\.safetensors is damaged or incomplete \(.*({message})"
        ):
            SafetensorsFile(path)
        # The library takes the later of two entries of the same name.
        if name != "a name twice":
            with pytest.raises(SafetensorError):
                safe_open(path, "pt")

    check_each(DAMAGED, check)


@pytest.mark.timeout(240)
def test_hostile_headers_are_refused_soon(tmp_path):
    """Each would take hours if the work grew with the square of its length.

    They take two seconds, and the time limit of the test is that of a hang.
    """
    names = ",".join(f'"{number}":0' for number in range(1_000_000))
    shape = ",".join(["9" * 18] * 1_000_000)
    path = tmp_path / "hostile.safetensors"
    for header, message in (
        (f'{{{names},"999999":0}}', "names 999999 twice"),
        (f'{{"x":{{"dtype":"F32","shape":[{shape}],"data_offsets":[0,0]}}}}', "tensor x"),
    ):
        path.write_bytes(encoded(header.encode()))
        with pytest.raises(ModelError, match=message):
            SafetensorsFile(path)


def test_what_the_library_writes_is_read(tmp_path):
    path = tmp_path / "whole.safetensors"
    tensors = {
        "wide": torch.randn(3, 5, dtype=torch.float64),
        "narrow": torch.randn(7).to(torch.bfloat16),
        "flags": torch.tensor([True, False, True]),
        "eight": torch.randn(5).to(torch.float8_e4m3fn),
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(3),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    with SafetensorsFile(path) as file:
        assert set(file.tensors) == set(tensors)
        buffer = bytes(file.buffer())
        for name, tensor in tensors.items():
            entry = file.tensors[name]
            assert entry.shape == tuple(tensor.shape), name
            expected = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert buffer[entry.start : entry.end] == expected, name
        counts = []
        assert file.sha256(counts.append) == hashlib.sha256(path.read_bytes()).hexdigest()
        assert sum(counts) == path.stat().st_size


def test_what_cannot_be_opened_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")

    def check(row):
        path, message = row
        with pytest.raises(ModelError, match=message):
            SafetensorsFile(tmp_path / path)

    rows = [
        ("absent", "absent cannot be read: No such file"),
        (".", "is not a file; name each safetensors file"),
        ("pipe", "pipe is not a file"),
        ("a\0b", "cannot be read: embedded null"),
        ("x" * 5000, "cannot be read: File name too long"),
    ]
    check_each(rows, check)


def test_an_open_file_outlives_its_replacement_and_notices_changes(tmp_path):
    path = tmp_path / "file.safetensors"
    save_file({"x": torch.zeros(4)}, path)
    with SafetensorsFile(path) as file:
        save_file({"x": torch.ones(4)}, tmp_path / "other")
        os.replace(tmp_path / "other", path)
        file.check_unchanged()
        entry = file.tensors["x"]
        assert bytes(file.buffer())[entry.start : entry.end] == bytes(16)
    with SafetensorsFile(path) as file:
        with open(path, "ab") as appending:
            appending.write(b"!")
        with pytest.raises(ModelError, match=r"file\.safetensors has changed while it was read"):
            file.check_unchanged()
