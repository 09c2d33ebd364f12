"""Files that are no cartridges, by accident or on purpose, and what is said about each.

Each case writes files to an empty directory: ``file``, and perhaps ``config.yaml``. A program that
runs what such a file asks for leaves ``marker`` in the directory.
"""

from __future__ import annotations

import builtins
import os
import pickle
import struct
import subprocess
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cartridge_files import (
    HEAD_DIM,
    NUM_HEADS,
    NUM_LAYERS,
    Calls,
    changed,
    edit_archive,
    fields,
    own_tensors,
    saved,
    tensors,
    with_number,
    write_archive,
    write_own,
)
from safetensors.torch import save_file


@dataclass(frozen=True)
class Case:
    """A hostile file.

    Attributes:
        make: writes it to a directory.
        says: a pattern of the error.
        needs_limits: it is only refused by a process with limits.
    """

    name: str
    make: Callable[[Path], object]
    says: str
    needs_limits: bool = False


def _saves(value: object) -> Callable[[Path], object]:
    return lambda directory: torch.save(value, directory / "file")


def _calls(function: object, *arguments: object) -> Callable[[Path], object]:
    """A cartridge with a call in the place of a tensor; MARKER becomes the marker's path."""

    def make(directory: Path) -> None:
        marker = str(directory / "marker")
        own = [a.replace("MARKER", marker) if isinstance(a, str) else a for a in arguments]
        torch.save(changed(trainable_keys=[Calls(function, *own)]), directory / "file")

    return make


def _runs(program: bytes) -> Callable[[Path], object]:
    """An archive with this pickle, in which MARKER becomes the marker's path."""
    return lambda directory: write_archive(
        directory / "file", program.replace(b"MARKER", str(directory / "marker").encode())
    )


def _writes(data: bytes) -> Callable[[Path], object]:
    return lambda directory: (directory / "file").write_bytes(data)


def _own(metadata: dict[str, str] | None = None, **changes: torch.Tensor) -> Callable:
    return lambda directory: write_own(directory / "file", metadata, **changes)


def _companion(text: str) -> Callable[[Path], object]:
    def make(directory: Path) -> None:
        torch.save(fields(), directory / "file")
        (directory / "config.yaml").write_text(text)

    return make


# --- programs -------------------------------------------------------------------------------------


def _parameter_list(**state: object) -> torch.nn.ParameterList:
    made = torch.nn.ParameterList(fields()["trainable_keys"])
    made.__dict__.update(state)
    return made


def _uninitialised(directory: Path) -> None:
    """The first tensor is made by a call, of memory as it happens to be."""
    made = changed(trainable_keys=[Calls(torch.Tensor, 1, 2, 4, 4), tensors(4, torch.float32)[1]])
    torch.save(made, directory / "file")


_TOUCH = "open('MARKER', 'w').close()"

PROGRAMS = [
    Case("os.system", _calls(os.system, "touch MARKER"), "call or make 'posix.system'"),
    Case("eval", _calls(builtins.eval, _TOUCH), "call or make '.*eval'"),
    Case("exec", _calls(builtins.exec, _TOUCH), "call or make '.*exec'"),
    Case("a process", _calls(subprocess.Popen, ["touch", "MARKER"]), "call or make '.*Popen'"),
    Case("open", _calls(builtins.open, "MARKER", "w"), "call or make '.*open'"),
    Case("getattr", _calls(getattr, "MARKER", "format"), "call or make '.*getattr'"),
    Case("an import", _calls(__import__, "antigravity"), "call or make '.*__import__'"),
    Case("a numpy array", _saves(changed(trainable_keys=[np.zeros(3)])), "call or make 'numpy"),
    Case("a module", _saves(changed(trainable_keys=torch.nn.Linear(2, 2))), "Linear"),
    Case(
        "a pickle of protocol 4",
        _runs(pickle.dumps(Calls(os.system, "touch MARKER"), 4)),
        "torch cannot read the file .*Unsupported operand",
    ),
    Case(
        "a pickle of protocol 0",
        _runs(b"(S'touch MARKER'\nios\nsystem\n."),
        "torch cannot read the file .*Unsupported operand",
    ),
    Case(
        "a bare pickle",
        _writes(pickle.dumps(Calls(os.system, "touch MARKER"), 2)),
        "is a bare pickle, which is not loaded",
    ),
    Case(
        "a call of a tensor's method",
        _runs(b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\ncposix\nsystem\n\x86R."),
        "'posix.system'",
    ),
    Case("memory that is not in the file", _uninitialised, "damaged: the keys of layer 0 go bey"),
    Case(
        "a pickle that ends in the middle", _runs(b"\x80\x02}(X\x0e\x00\x00\x00trainable"), "torch"
    ),
    Case("a pickle that takes from an empty stack", _runs(b"\x80\x02\x85R."), "torch cannot read"),
    Case("a pickle without an end", _runs(b"\x80\x02" + b"]" * 1000), "torch cannot read"),
    Case(
        "a list with attributes of its own",
        _saves(changed(trainable_keys=_parameter_list(_parameters={"0": None, "7": None}))),
        "trainable_keys is a damaged ParameterList",
    ),
    Case(
        "a list that is no list",
        _saves(changed(trainable_keys=_parameter_list(_parameters=3))),
        "trainable_keys is a damaged ParameterList",
    ),
]

# --- damage ---------------------------------------------------------------------------------------


def _half(data: bytes) -> Callable[[Path], object]:
    return _writes(data[: len(data) // 2])


def _short_storage(directory: Path) -> None:
    torch.save(fields(), directory / "file")
    edit_archive(directory / "file", "data/0", b"\x00" * 4)


def _half_safetensors(directory: Path) -> None:
    write_own(directory / "whole")
    data = (directory / "whole").read_bytes()
    (directory / "file").write_bytes(data[: len(data) // 2])


def _flipped_bit(directory: Path) -> None:
    from tokasaurus.cartridges.contents import Contents, Piece
    from tokasaurus.cartridges.writing import save

    bits = np.zeros((5, NUM_HEADS, HEAD_DIM), np.uint16)
    save(Contents("", [([Piece(bits, "BF16")], [Piece(bits, "BF16")])]), directory / "file")
    data = bytearray((directory / "file").read_bytes())
    data[-1] ^= 1
    (directory / "file").write_bytes(data)


DAMAGE = [
    Case("nothing", _writes(b""), "the file is empty"),
    Case("half an archive", _half(saved(fields())), "damaged or incomplete archive"),
    Case("half a safetensors file", _half_safetensors, "the file is damaged or incomplete"),
    Case("an archive without its end", _writes(saved(fields())[:-20]), "damaged or incomplete"),
    Case("tensors beyond their storage", _short_storage, "go beyond what it has of them"),
    Case("a header beyond the file", _writes(struct.pack("<Q", 1 << 40) + b"{}"), "header is lon"),
    Case("text", _writes(b"this is not a cartridge, just text\n" * 9), "neither an arch"),
    Case("a web page", _writes(b"<!DOCTYPE html><html>404</html>"), "web page"),
    Case(
        "a pointer of Git LFS",
        _writes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "pointer of Git LFS",
    ),
    Case(
        "another archive", lambda d: zipfile.ZipFile(d / "file", "w").writestr("a", "b"), "not one"
    ),
    Case("a flipped bit", _flipped_bit, "the file is damaged: its tensors have the digest"),
]

# --- numbers and types ----------------------------------------------------------------------------


def _quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is going out of fashion
        return torch.quantize_per_tensor(
            torch.zeros(1, NUM_HEADS, 4, HEAD_DIM), 1.0, 0, torch.qint8
        )


def _first_keys(tensor: object) -> dict[str, object]:
    return changed(trainable_keys=[tensor, *tensors(4)[1:]])


_PLAIN = torch.zeros(1, NUM_HEADS, 4, HEAD_DIM)

NUMBERS = [
    Case(
        "a NaN",
        _saves(with_number(float("nan"), torch.bfloat16)),
        "the values of layer 1 have a NaN at position 3; numbers must be between",
    ),
    Case("infinity", _saves(with_number(float("inf"), torch.float32)), "the number inf at pos"),
    Case("minus infinity", _saves(with_number(-float("inf"), torch.float16)), "number -inf at"),
    Case("a huge number", _saves(with_number(1e30, torch.float32)), "number 1e[+]30 at position 3"),
    Case("a NaN in F16", _saves(with_number(float("nan"), torch.float16)), "a NaN at position 3"),
    Case(
        "a NaN in a safetensors file",
        _own(values_1=torch.full((5, NUM_HEADS, HEAD_DIM), float("nan"))),
        "values of layer 1 have a NaN at position 0|tensor",
    ),
    Case("float64", _saves(fields(dtype=torch.float64)), r"trainable_keys\[0\] is float64; it can"),
    Case("whole numbers", _saves(_first_keys(_PLAIN.long())), "is int64; it can be"),
    Case("truth values", _saves(_first_keys(_PLAIN.bool())), "is bool; it can be"),
    Case(
        "complex numbers", _saves(_first_keys(_PLAIN.to(torch.complex64))), "is complex64; it can"
    ),
    Case("quantized numbers", _saves(_first_keys(_quantized())), "not a plain tensor: .*quantized"),
    Case("a sparse tensor", _saves(_first_keys(_PLAIN.to_sparse())), "not a plain tensor: sparse"),
    Case("a tensor without numbers", _saves(_first_keys(_PLAIN.to("meta"))), "on meta"),
    Case("bytes", _own(keys_0=torch.zeros(5, 2, 4).to(torch.float8_e4m3fn)), "keys.0 is F8_E4M3"),
]

# --- bombs ----------------------------------------------------------------------------------------


def _encrypted(directory: Path) -> None:
    write_archive(directory / "file")
    data = bytearray((directory / "file").read_bytes())
    central = data.index(b"PK\x01\x02")
    data[central + 8] |= 1
    (directory / "file").write_bytes(data)


def _compressed_storage(directory: Path) -> None:
    huge = torch.zeros(1, NUM_HEADS, 200_000, HEAD_DIM)
    torch.save(changed(trainable_keys=[huge] * NUM_LAYERS), directory / "plain")
    with (
        zipfile.ZipFile(directory / "plain") as plain,
        zipfile.ZipFile(directory / "file", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for each in plain.infolist():
            packed.writestr(each.filename, plain.read(each))


def _twice(directory: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_archive(directory / "file", entries=(("archive/data.pkl", b"N."),))


def _expanded(*shape: int) -> torch.Tensor:
    """A tensor of one number, which claims to be large."""
    return torch.zeros(1, dtype=torch.bfloat16).expand(shape)


def _all_expanded(*shape: int) -> dict[str, object]:
    layers = [_expanded(*shape)] * NUM_LAYERS
    return {"trainable_keys": layers, "trainable_values": layers}


_TOKENS_LIMIT = 1 << 20

BOMBS = [
    Case(
        "a compressed pickle",
        lambda d: write_archive(d / "file", bytes(50_000_000), compression=zipfile.ZIP_DEFLATED),
        "'archive/data.pkl' is compressed, to [0-9]+ from 50000000 bytes",
    ),
    Case("compressed tensors", _compressed_storage, "is compressed"),
    Case("a large pickle", lambda d: write_archive(d / "file", bytes(40 << 20)), "data.pkl has"),
    Case("an encrypted archive", _encrypted, "is encrypted"),
    Case(
        "two pickles of one name",
        _twice,
        "several entries of one name",
    ),
    Case(
        "two pickles",
        lambda d: write_archive(d / "file", entries=(("other/data.pkl", b"N."),)),
        "not one of torch.save",
    ),
    Case("a million million positions", _saves(_all_expanded(1, 2, 10**12, 4)), "limit is 1048576"),
    Case("heads without end", _saves(_all_expanded(1, 10**9, 1, 128)), "no model has so many"),
    Case("numbers without end", _saves(_all_expanded(1, 1, 1, 1 << 40)), "no model has so many"),
    Case(
        "a tensor of terabytes",
        _saves(_all_expanded(1, 1024, 1 << 20, 1024)),
        "its tensors have 8796093022208 bytes; the limit is",
    ),
    # Without a limit the next two would succeed: the system gives memory when it is written to.
    Case(
        "three gigabytes of zeros",
        _runs(b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\xc0\x00\x85R."),
        "takes more than 1024 MiB of memory, which no cartridge needs",
        needs_limits=True,
    ),
    Case(
        "a tensor of three gigabytes that is not in the file",
        _runs(b"\x80\x02ctorch\nTensor\n\x8a\x04\x00\x00\x00\x30\x85R."),
        "torch cannot read the file .*alloc",
        needs_limits=True,
    ),
    Case(
        "layers without end",
        _saves({"trainable_keys": tensors(1)[:1] * 5000, "trainable_values": []}),
        "trainable_keys has 5000 layers",
    ),
    Case(
        "a list in itself",
        _runs(b"\x80\x02}(X\x0e\x00\x00\x00trainable_keys]q\x00h\x00aX\x10\x00\x00\x00"
              b"trainable_values]u."),
        r"trainable_keys\[0\] is of type list where a tensor belongs",
    ),
]  # fmt: skip

# --- layouts --------------------------------------------------------------------------------------

LAYOUTS = [
    Case("a list", _saves([1, 2]), "holds of type list where a cartridge is a dict"),
    Case("weights", _saves({"weight": torch.zeros(3)}), "has 'weight', which a cartridge has not"),
    Case("no keys", _saves({"trainable_values": tensors(4)}), "lacks trainable_keys"),
    Case("no layers", _saves({"trainable_keys": [], "trainable_values": None}), "has no layers"),
    Case("a number", _saves(changed(trainable_keys=3)), "trainable_keys is of type int where"),
    Case("texts", _saves(changed(frozen_keys=["a", "b"])), r"frozen_keys\[0\] is of type str"),
    Case("both generations", _saves({**fields(), **fields(name="fixed")}), "both frozen_keys and"),
    Case("three dimensions", _saves(_first_keys(_PLAIN[0])), r"has shape \[2, 4, 4\]; it should"),
    Case("two cartridges", _saves(_first_keys(_PLAIN.repeat(2, 1, 1, 1))), r"has shape \[2, 2, 4"),
    Case(
        "fewer values", _saves(changed(trainable_values=tensors(4)[:1])), "2 trainable_keys and 1"
    ),
    Case(
        "fewer frozen layers",
        _saves(changed(frozen_keys=tensors(1)[:1], frozen_values=tensors(1)[:1])),
        "1 layers of frozen keys and 2 trainable",
    ),
    Case(
        "uneven positions", _saves(_first_keys(_PLAIN[:, :, :3].bfloat16())), "same number of pos"
    ),
    Case("uneven heads", _saves(_first_keys(_PLAIN[:, :1].bfloat16())), "where they are frozen"),
    Case("no positions", _saves(_all_expanded(1, 2, 0, 4)), "0 positions of 2 x 4 numbers"),
    Case("no heads", _saves(_all_expanded(1, 0, 3, 4)), "3 positions of 0 x 4 numbers"),
    Case(
        "big-endian numbers",
        lambda d: (torch.save(fields(), d / "file"), edit_archive(d / "file", "byteorder", b"big")),
        "byte order 'big'",
    ),
    Case(
        "weights as safetensors", lambda d: save_file({"w": torch.ones(3)}, d / "file"), "not a c"
    ),
    Case("a tensor too many", _own(x=torch.ones(3)), "the tensor 'x', which a cartridge has not"),
    Case("a layer too many", _own(keys_7=torch.zeros(5, 2, 4)), "lacks tensors: keys.2"),
    Case("uneven tensors", _own(keys_1=torch.zeros(4, 2, 4)), "keys.1 has shape"),
    Case("the trainer's shape", _own(keys_0=torch.zeros(1, 2, 5, 4)), r"\[1, 2, 5, 4\]; it should"),
    Case(
        "no heads in a safetensors file",
        lambda d: save_file({n: t[:, :0] for n, t in own_tensors().items()}, d / "file"),
        "5 positions of 0 x 4 numbers",
    ),
    Case("a later format", _own({"format": "tokasaurus cartridge 2"}), "this version reads"),
    Case(
        "more frozen positions than there are",
        _own({"format": "tokasaurus cartridge 1", "num_frozen": "6"}),
        "num_frozen: '6'; it has 5 positions",
    ),
    Case(
        "a name that no model has",
        _own({"format": "tokasaurus cartridge 1", "model": "a\x1b[31m"}),
        r"model: 'a\\x1b\[31m', which is no model's name",
    ),
    Case(
        "the digest of another file",
        _own({"format": "tokasaurus cartridge 1", "digest": "0" * 64}),
        "the file is damaged: its tensors have the digest",
    ),
]

# --- companions -----------------------------------------------------------------------------------


def _doubles(depth: int) -> str:
    """YAML whose keys double with every line, unless the library takes each of them once."""
    lines = ["a0: &a0 {k: v}"]
    lines += [f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, depth)]
    return "\n".join(lines)


def _repeats(num_keys: int, times: int) -> str:
    """YAML whose lines have all keys of the first line."""
    keys = ", ".join(f"k{i}: v" for i in range(num_keys))
    return "\n".join([f"a: &a {{{keys}}}", *(f"b{i}: {{<<: *a}}" for i in range(times))])


COMPANIONS = [
    Case("broken YAML", _companion("a: [1, 2"), r"its config.yaml cannot be read .*correct it"),
    Case("YAML without keys", _companion("- 1\n- 2"), "has no keys and values"),
    Case("a large companion", _companion("a: " + "b" * (1 << 20)), "larger than 1048576 bytes"),
    Case("deep YAML", _companion("[" * 50_000), "its config.yaml cannot be read"),
    Case("YAML that repeats", _companion(_repeats(300, 50)), "more than 10000 keys"),
    Case(
        "a name that is no text",
        _companion("model: {pretrained_model_name_or_path: [1, 2]}"),
        r"pretrained_model_name_or_path: '\[1, 2\]', which is no model's name",
    ),
    Case("a key that is a list", _companion("? [1, 2]\n: 3"), "its config.yaml cannot be read"),
]

# Refused by what merges, or harmless: PyYAML 6.0.4 takes each key once.
DOUBLING = Case("YAML that doubles", _companion(_doubles(64)), "more than 10000 keys")

KINDS = {
    "programs": PROGRAMS,
    "damage": DAMAGE,
    "numbers": NUMBERS,
    "bombs": BOMBS,
    "layouts": LAYOUTS,
    "companions": COMPANIONS,
}
CASES = [case for cases in KINDS.values() for case in cases]
