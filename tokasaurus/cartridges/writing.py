"""Checks the numbers of a cartridge, computes its digest, and writes the file that workers read.

All in one pass over the tensors, a few positions at a time, so that memory does not grow with the
file. No torch.

The digest is the SHA-256 of all tensors, keys before values, layer by layer. Of each tensor it
takes in a line ``NAME DTYPE [TOKENS, KV_HEADS, HEAD_DIM]`` and then its bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from tokasaurus.cartridge_file import key_name, value_name
from tokasaurus.cartridges.contents import ITEM_BYTES, Bits, Contents, Piece, Refusal
from tokasaurus.cartridges.new_file import disk_error, new_file, put_in_place
from tokasaurus.cartridges.specification import CartridgeMetadata, ModelShape

__all__ = ["FORMAT", "metadata_of", "save", "write"]

FORMAT = "tokasaurus cartridge 1"
"""What the metadata of a file says that it is."""

_CHUNK_BYTES = 4 << 20
# Of one position in one layer. No model comes near it.
_MAX_POSITION_NUMBERS = 1 << 20
# The largest number of fp16. Every dtype of a KV cache holds what is below.
_LARGEST = 65504.0
_DIGEST_DIGITS = 64
_HEADER_BEFORE_DIGEST = '{"__metadata__":{"digest":"'


def metadata_of(contents: Contents, max_tokens: int, max_bytes: int) -> CartridgeMetadata:
    """Sizes, before any number is read; the digest is still "".

    Raises:
        Refusal: the tensors do not fit one another, or there is too much of them.
    """
    pieces = contents.pieces()
    shapes = {name: _shape(parts, name) for name, parts in pieces}
    (first, shape), *_ = shapes.items()
    for name, other in shapes.items():
        if other != shape:
            raise Refusal(
                f"{name} have the shape {list(other)}, {first} have {list(shape)} "
                "(tokens, KV heads, numbers per head)"
            )
    num_tokens, num_kv_heads, head_dim = shape
    if min(shape) < 1:
        raise Refusal(f"the file has {num_tokens} positions of {num_kv_heads} x {head_dim} numbers")
    if num_tokens > max_tokens:
        raise Refusal(f"the file has {num_tokens} positions; the limit is {max_tokens}")
    if num_kv_heads * head_dim > _MAX_POSITION_NUMBERS:
        raise Refusal(
            f"the file has {num_kv_heads} heads of {head_dim} numbers; no model has so many"
        )
    dtypes = {part.dtype for _, parts in pieces for part in parts}
    # All numbers of the smaller dtypes are in F32.
    dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
    num_bytes = len(pieces) * num_tokens * num_kv_heads * head_dim * ITEM_BYTES[dtype]
    if num_bytes > max_bytes:
        raise Refusal(f"its tensors have {num_bytes} bytes; the limit is {max_bytes}")
    return CartridgeMetadata(
        digest="",
        num_tokens=num_tokens,
        num_frozen=contents.num_frozen,
        shape=ModelShape(
            len(contents.layers), num_kv_heads, head_dim, contents.model, contents.rope
        ),
        dtype=dtype,
        num_bytes=num_bytes,
        tokenizer=contents.tokenizer,
    )


def write(contents: Contents, metadata: CartridgeMetadata, target: BinaryIO | None) -> str:
    """Reads every number, and writes the file.

    Args:
        contents: what ``metadata`` was made of.
        target: an empty file; None to write none.

    Returns:
        The digest.

    Raises:
        Refusal: a number is no number, infinite or too large.
        OSError: of the target.
    """
    if target is not None:
        target.write(_header(metadata))
    sha256 = hashlib.sha256()
    shape = [metadata.num_tokens, metadata.shape.num_kv_heads, metadata.shape.head_dim]
    names = _names(metadata)
    for name, (label, parts) in zip(names, contents.pieces(), strict=True):
        sha256.update(f"{name} {metadata.dtype} {shape}\n".encode())
        position = 0
        for chunk, dtype in _chunks(parts):
            numbers = _numbers(chunk, dtype)
            _check_numbers(numbers, position, label)
            data = memoryview(chunk if dtype == metadata.dtype else numbers)  # type: ignore[arg-type]
            sha256.update(data)
            if target is not None:
                target.write(data)
            position += len(chunk)
    digest = sha256.hexdigest()
    if target is not None:
        target.flush()
        target.seek(8 + len(_HEADER_BEFORE_DIGEST))
        target.write(digest.encode())
        target.flush()
    return digest


def save(contents: Contents, target: Path) -> CartridgeMetadata:
    """Writes a cartridge of our own making, of any size.

    Args:
        target: takes its name when it is complete and on the disk.

    Raises:
        Refusal: a number is no number, infinite or too large.
        StorageFull, EngineError: it cannot be written.
    """
    metadata = metadata_of(contents, sys.maxsize, sys.maxsize)
    with new_file(target) as (file, path):
        try:
            with os.fdopen(os.dup(file.fileno()), "wb") as writer:
                digest = write(contents, metadata, writer)
        except OSError as error:
            raise disk_error(error) from error
        put_in_place(file, path, target)
    return dataclasses.replace(metadata, digest=digest)


def _names(metadata: CartridgeMetadata) -> list[str]:
    layers = range(metadata.shape.num_layers)
    return [name(layer) for layer in layers for name in (key_name, value_name)]


def _header(metadata: CartridgeMetadata) -> bytes:
    """What comes before the tensors, with zeros in the place of the digest."""
    shape = metadata.shape
    sizes = [metadata.num_tokens, shape.num_kv_heads, shape.head_dim]
    names = _names(metadata)
    tensor_bytes = metadata.num_bytes // len(names)
    said = {
        "digest": "0" * _DIGEST_DIGITS,
        "format": FORMAT,
        "num_frozen": str(metadata.num_frozen),
        "model": shape.name,
        "rope": shape.rope,
        "tokenizer": metadata.tokenizer,
    }
    fields: dict[str, object] = {
        "__metadata__": {name: text for name, text in said.items() if text}
    }
    for index, name in enumerate(names):
        fields[name] = {
            "dtype": metadata.dtype,
            "shape": sizes,
            "data_offsets": [index * tensor_bytes, (index + 1) * tensor_bytes],
        }
    text = json.dumps(fields, separators=(",", ":"))
    assert text.startswith(_HEADER_BEFORE_DIGEST)
    # Tensors are aligned, as those of the safetensors library.
    text += " " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text.encode("ascii")


def _shape(parts: Sequence[Piece], name: str) -> tuple[int, ...]:
    first, *others = parts
    for other in others:
        if other.bits.shape[1:] != first.bits.shape[1:]:
            raise Refusal(
                f"{name} have {list(first.bits.shape[1:])} KV heads and numbers per head where "
                f"they are frozen, and {list(other.bits.shape[1:])} where they are trainable"
            )
    return (sum(part.num_tokens for part in (first, *others)), *first.bits.shape[1:])


def _chunks(parts: Sequence[Piece]) -> Iterator[tuple[Bits, str]]:
    """Contiguous copies of a few positions each, with their dtype."""
    for part in parts:
        row_bytes = max(1, part.bits[:1].size * part.bits.itemsize)
        step = max(1, _CHUNK_BYTES // row_bytes)
        for start in range(0, part.num_tokens, step):
            yield np.ascontiguousarray(part.bits[start : start + step]), part.dtype


def _numbers(chunk: Bits, dtype: str) -> NDArray[np.float32]:
    if dtype == "F32":
        return chunk.view(np.float32)
    if dtype == "F16":
        return chunk.view(np.float16).astype(np.float32)
    numbers: NDArray[np.float32] = (chunk.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return numbers


def _check_numbers(numbers: NDArray[np.float32], position: int, label: str) -> None:
    """Raises Refusal unless a KV cache of any dtype holds all of them."""
    with np.errstate(all="ignore"):
        wrong = ~(np.abs(numbers) <= _LARGEST)
    if not wrong.any():
        return
    where = np.argwhere(wrong)[0]
    value = float(numbers[tuple(where)])
    found = "a NaN" if np.isnan(value) else f"the number {value:g}"
    raise Refusal(
        f"{label} have {found} at position {position + int(where[0])}; numbers must be between "
        f"{-_LARGEST:g} and {_LARGEST:g}, the range of float16. The training has probably diverged"
    )
