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

# An array is encoded as its dtype's code (u8), the number of dimensions (u8, at most three), each
# dimension (u32), and the data.
_HEADERS = [struct.Struct(f"<BB{num_dimensions}I") for num_dimensions in range(4)]
_PACK = [header.pack for header in _HEADERS]
_ROW_HEADER_BYTES = _HEADERS[1].size

# Most arrays of most messages are empty, so empty arrays are made once.
_EMPTY = [np.empty(0, dtype) for dtype in _DTYPES]
_EMPTY_EXT = [msgspec.msgpack.Ext(_ARRAY, _PACK[1](code, 1, 0)) for code in range(len(_DTYPES))]
for _array in _EMPTY:
    _array.setflags(write=False)


def _encode_array(value: Any) -> msgspec.msgpack.Ext:
    code = _CODES.get(value.dtype) if isinstance(value, np.ndarray) else None
    if code is None:
        kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(
            f"cannot put a {kind} into a message; arrays are int32, int64, float32, float64 or bool"
        )
    shape = value.shape
    if shape == (0,):
        return _EMPTY_EXT[code]
    header = _PACK[len(shape)](code, len(shape), *shape)
    return msgspec.msgpack.Ext(_ARRAY, header + value.tobytes())


def _decode_array(code: int, data: memoryview) -> np.ndarray[Any, Any]:
    if code != _ARRAY:
        raise msgspec.ValidationError(f"unknown extension {code} in a message")
    dtype_code, num_dimensions = data[0], data[1]
    # By position: keyword arguments of frombuffer take longer than all the rest.
    if num_dimensions == 1:
        if len(data) == _ROW_HEADER_BYTES:
            return _EMPTY[dtype_code]
        return np.frombuffer(data, _DTYPES[dtype_code], -1, _ROW_HEADER_BYTES)
    header = _HEADERS[num_dimensions]
    array = np.frombuffer(data, _DTYPES[dtype_code], -1, header.size)
    return array.reshape(header.unpack_from(data)[2:])


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
        """Encodes a message.

        Raises:
            TypeError: an array has a type that the wire does not carry.
        """
        return self._encoder.encode(message)

    def decode(self, data: bytes | memoryview) -> M:
        """Decodes a message.

        Raises:
            msgspec.ValidationError: the bytes are not a message of this type.
        """
        return self._decoder.decode(data)
