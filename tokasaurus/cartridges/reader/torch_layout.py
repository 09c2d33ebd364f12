"""Cartridges as trainers publish them: files of ``torch.save`` with lists of tensors.

::

    {"trainable_keys": [...], "trainable_values": [...],     a tensor for each layer,
     "frozen_keys":    [...], "frozen_values":    [...]}     [1, kv_heads, tokens, head_dim]

Older files say ``fixed`` for ``frozen``. Lists are those of Python or ``ParameterList``. Frozen
positions come before trainable ones; there may be none.

Such a file is a zip archive with a pickle, so the archive is checked first. Then torch reads it
with ``weights_only=True``, which calls nothing but functions that make tensors. Torch believes what
the pickle says about sizes, so they are compared with those of the archive.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from tokasaurus.cartridges.contents import Contents, Layer, Piece, Refusal, quoted

__all__ = ["read_torch_file"]

_PICKLE, _BYTE_ORDER = "data.pkl", "byteorder"
_MAX_PICKLE_BYTES = 32 << 20
_MAX_ENTRIES = 100_000
_MAX_LAYERS = 4096

_PARAMETER_LIST = "torch.nn.modules.container.ParameterList"
_FROZEN = ("frozen", "fixed")
_KEYS = tuple(f"{part}_{kind}" for part in ("trainable", *_FROZEN) for kind in ("keys", "values"))
_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_REMEDY = "save it again with torch.save and lists of tensors only"


class _ParameterList:
    """Takes the place of torch's, so that no method of a module runs: a bag of attributes."""


def read_torch_file(descriptor: int) -> Contents:
    """Reads a file of ``torch.save``, whose tensors are mapped, not copied.

    Raises:
        Refusal: it is no cartridge.
    """
    with os.fdopen(os.dup(descriptor), "rb") as file:
        spans = _spans(file, os.fstat(descriptor).st_size)
    loaded, address = _load(f"/dev/fd/{descriptor}")
    if not isinstance(loaded, dict):
        raise Refusal(f"the file holds {_kind(loaded)} where a cartridge is a dict; {_REMEDY}")
    contents = _contents(loaded)
    _check_places(contents, address, spans)
    return contents


# --- the archive ----------------------------------------------------------------------------------


def _spans(file: BinaryIO, num_bytes: int) -> list[tuple[int, int]]:
    """Checks the archive; returns where the bytes of each entry begin and end, in order."""
    try:
        archive = zipfile.ZipFile(file)
        entries = archive.infolist()
        _check_entries(entries, num_bytes)
        orders = [each for each in entries if each.filename.split("/")[1:] == [_BYTE_ORDER]]
        order = archive.read(orders[0])[:16].decode("latin-1") if orders else "little"
        spans = sorted(_span(file, entry) for entry in entries)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        raise Refusal(
            f"the file is a damaged or incomplete archive ({quoted(error)}); copy it again"
        ) from None
    if order != "little":
        raise Refusal(f"its numbers have the byte order {quoted(order)}; only 'little' is read")
    return spans


def _span(file: BinaryIO, entry: zipfile.ZipInfo) -> tuple[int, int]:
    # https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.7: the header of an entry has
    # 30 bytes, the last four of which say how long a name and extra fields follow.
    file.seek(entry.header_offset + 26)
    name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
    start = entry.header_offset + 30 + name_bytes + extra_bytes
    return start, start + entry.file_size


def _check_entries(entries: Sequence[zipfile.ZipInfo], num_bytes: int) -> None:
    """Only what torch.save writes: stored entries, which are no larger than the archive."""
    if len(entries) > _MAX_ENTRIES:
        raise Refusal(f"the archive has {len(entries)} entries; a cartridge has a few hundred")
    names = {entry.filename for entry in entries}
    if len(names) < len(entries):
        raise Refusal(f"the archive has several entries of one name; {_REMEDY}")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise Refusal(
                f"the archive's entry {quoted(entry.filename)} is compressed, to "
                f"{entry.compress_size} from {entry.file_size} bytes; torch.save does not compress"
            )
        if entry.flag_bits & 1:
            raise Refusal(f"the archive's entry {quoted(entry.filename)} is encrypted")
    total = sum(entry.file_size for entry in entries)
    if total > num_bytes:
        raise Refusal(f"the archive's entries have {total} bytes, the file has {num_bytes}")
    pickles = [entry for entry in entries if entry.filename.split("/")[1:] == [_PICKLE]]
    if len(pickles) != 1:
        raise Refusal(f"the file is a zip archive, but not one of torch.save; {_REMEDY}")
    if pickles[0].file_size > _MAX_PICKLE_BYTES:
        raise Refusal(
            f"the archive's {_PICKLE} has {pickles[0].file_size} bytes, the limit is "
            f"{_MAX_PICKLE_BYTES}; {_REMEDY}"
        )


# --- the pickle -----------------------------------------------------------------------------------


def _load(path: str) -> tuple[Any, int]:
    """What the pickle describes, and the address that torch has mapped the file at."""
    with (
        torch.serialization.safe_globals([(_ParameterList, _PARAMETER_LIST)]),
        warnings.catch_warnings(),
        _mappings() as mapped,
    ):
        warnings.simplefilter("ignore")
        try:
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if unsafe:
                names = ", ".join(map(quoted, sorted(unsafe)[:3]))
                raise Refusal(
                    f"the file asks to call or make {names} when it is loaded, which is not done: "
                    f"a cartridge holds tensors only; {_REMEDY}"
                )
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return loaded, mapped[0].data_ptr()
        except (Refusal, MemoryError):
            raise
        # Hostile pickles end in any of them.
        except Exception as error:
            reason = quoted(str(error).partition("\n")[0] or type(error).__name__)
            raise Refusal(f"torch cannot read the file ({reason}); {_REMEDY}") from error


@contextlib.contextmanager
def _mappings() -> Iterator[list[Any]]:
    """Collects what torch maps meanwhile: ``torch.load`` does not say where."""
    made: list[Any] = []
    original = torch.UntypedStorage.from_file

    def from_file(*arguments: Any) -> Any:
        made.append(original(*arguments))
        return made[-1]

    torch.UntypedStorage.from_file = from_file  # type: ignore[method-assign, assignment]
    try:
        yield made
    finally:
        torch.UntypedStorage.from_file = original  # type: ignore[method-assign]


def _check_places(contents: Contents, address: int, spans: Sequence[tuple[int, int]]) -> None:
    """Raises Refusal unless the numbers of each tensor are those of one entry of the archive.

    Tensors that a pickle makes of other memory are not: their numbers are whatever was there.
    """
    starts = [start for start, _ in spans]
    for name, pieces in contents.pieces():
        for bits in (piece.bits for piece in pieces if piece.bits.size):
            first = bits.__array_interface__["data"][0] - address
            reach = sum((n - 1) * step for n, step in zip(bits.shape, bits.strides, strict=True))
            index = bisect.bisect_right(starts, first) - 1
            if index < 0 or first + reach + bits.itemsize > spans[index][1]:
                raise Refusal(
                    f"the file is damaged: {name} go beyond what it has of them; copy it again"
                )


# --- the tensors ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """The frozen or the trainable positions, by layer."""

    keys: list[Piece]
    values: list[Piece]

    @property
    def num_tokens(self) -> int:
        return self.keys[0].num_tokens if self.keys else 0


def _contents(loaded: Mapping[Any, Any]) -> Contents:
    if unknown := [key for key in loaded if key not in _KEYS]:
        raise Refusal(
            f"the file has {quoted(unknown[0])}, which a cartridge has not: it has "
            "trainable_keys and trainable_values, and frozen_keys and frozen_values"
        )
    names = [name for name in _FROZEN if f"{name}_keys" in loaded or f"{name}_values" in loaded]
    if len(names) > 1:
        raise Refusal("the file has both frozen_keys and fixed_keys; it can have one of them")
    trainable = _part(loaded, "trainable")
    frozen = _part(loaded, names[0]) if names else _Part([], [])
    if not trainable.keys and not frozen.keys:
        raise Refusal("the file has no layers: its lists of tensors are empty")
    sizes = [len(part.keys) for part in (frozen, trainable) if part.keys]
    if len(set(sizes)) > 1:
        raise Refusal(f"the file has {sizes[0]} layers of {names[0]} keys and {sizes[1]} trainable")
    layers: list[Layer] = [
        (
            [part.keys[layer] for part in (frozen, trainable) if part.keys],
            [part.values[layer] for part in (frozen, trainable) if part.keys],
        )
        for layer in range(sizes[0])
    ]
    layout = f"torch.save, {names[0]} and trainable" if names else "torch.save, trainable"
    return Contents(layout, layers, frozen.num_tokens)


def _part(loaded: Mapping[Any, Any], part: str) -> _Part:
    keys, values = (_pieces(loaded, f"{part}_{kind}") for kind in ("keys", "values"))
    if len(keys) != len(values):
        raise Refusal(f"the file has {len(keys)} {part}_keys and {len(values)} {part}_values")
    tokens = {piece.num_tokens for piece in (*keys, *values)}
    if len(tokens) > 1:
        raise Refusal(
            f"the {part} tensors do not all have the same number of positions: {sorted(tokens)[:4]}"
        )
    return _Part(keys, values)


def _pieces(loaded: Mapping[Any, Any], name: str) -> list[Piece]:
    value = loaded.get(name)
    if name not in loaded and not name.startswith("trainable"):
        raise Refusal(f"the file lacks {name}")
    if name not in loaded:
        raise Refusal(f"the file lacks {name}: a cartridge has trainable_keys and trainable_values")
    entries = _entries(value, name)
    if len(entries) > _MAX_LAYERS:
        raise Refusal(f"{name} has {len(entries)} layers; the limit is {_MAX_LAYERS}")
    return [_piece(entry, f"{name}[{index}]") for index, entry in enumerate(entries)]


def _entries(value: object, name: str) -> Sequence[object]:
    """The tensors of a list, in order."""
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, _ParameterList):
        parameters = vars(value).get("_parameters")
        if isinstance(parameters, dict):
            expected = [str(index) for index in range(len(parameters))]
            if list(parameters) == expected:
                return list(parameters.values())
        raise Refusal(f"{name} is a damaged ParameterList; {_REMEDY}")
    raise Refusal(f"{name} is {_kind(value)} where a list of tensors belongs; {_REMEDY}")


def _piece(tensor: object, name: str) -> Piece:
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise Refusal(f"{name} is {_kind(tensor)} where a tensor belongs; {_REMEDY}")
    assert isinstance(tensor, Tensor)
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise Refusal(f"{name} is not a plain tensor: {_description(tensor)}; {_REMEDY}")
    if tensor.dtype not in _DTYPES:
        raise Refusal(
            f"{name} is {str(tensor.dtype).removeprefix('torch.')}; it can be bfloat16, float16 or "
            "float32"
        )
    if tensor.dim() != 4 or tensor.shape[0] != 1:
        raise Refusal(
            f"{name} has shape {list(tensor.shape)}; it should have [1, kv_heads, tokens, head_dim]"
        )
    whole = torch.int32 if tensor.dtype == torch.float32 else torch.int16
    bits = tensor.detach()[0].transpose(0, 1).view(whole).numpy()
    return Piece(bits.view(np.uint32 if whole == torch.int32 else np.uint16), _DTYPES[tensor.dtype])


def _description(tensor: Tensor) -> str:
    layout = str(tensor.layout).removeprefix("torch.")
    return f"{layout}, on {tensor.device.type}" + (", quantized" if tensor.is_quantized else "")


def _kind(value: object) -> str:
    return f"of type {type(value).__name__.lstrip('_')}"
