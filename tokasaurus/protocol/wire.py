"""Wire encoding of the messages: MessagePack, arrays as raw little-endian bytes, no pickle."""

from __future__ import annotations

import struct
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np

M = TypeVar("M")

_ARRAY = 1  # MessagePack extension code
_DTYPES = [np.dtype(name) for name in ("<i4", "<i8", "<f4", "|b1", "<f8")]
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}


def _encode_array(value: Any) -> msgspec.msgpack.Ext:
    # dtype code (u8), number of dimensions (u8), each dimension (u32), then the data.
    if not isinstance(value, np.ndarray) or value.dtype not in _CODES:
        kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(
            f"cannot put a {kind} into a message; arrays are int32, int64, float32, float64 or bool"
        )
    header = struct.pack(f"<BB{value.ndim}I", _CODES[value.dtype], value.ndim, *value.shape)
    return msgspec.msgpack.Ext(_ARRAY, header + value.tobytes())


def _decode_array(code: int, data: memoryview) -> np.ndarray[Any, Any]:
    if code != _ARRAY:
        raise msgspec.ValidationError(f"unknown extension {code} in a message")
    dtype_code, ndim = struct.unpack_from("<BB", data)
    shape = struct.unpack_from(f"<{ndim}I", data, 2)
    return np.frombuffer(data, _DTYPES[dtype_code], offset=2 + 4 * ndim).reshape(shape)


class Codec(Generic[M]):
    """Encodes and decodes the messages of one direction.

    Decoded arrays are read-only views of the received bytes.

    Args:
        message_type: a message class, or a union of them.
    """

    def __init__(self, message_type: Any) -> None:
        self._encoder = msgspec.msgpack.Encoder(enc_hook=_encode_array)
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(
            message_type, ext_hook=_decode_array
        )

    def encode(self, message: M) -> bytes:
        """Raises TypeError for an array of a type the wire does not carry."""
        return self._encoder.encode(message)

    def decode(self, data: bytes | memoryview) -> M:
        """Raises msgspec.ValidationError if the bytes are no such message."""
        return self._decoder.decode(data)
