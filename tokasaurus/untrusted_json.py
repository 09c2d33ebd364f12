"""JSON from clients, in requests and in lines of batches.

A decoded list, object or text takes up to 25 times the memory of its JSON, so their number is
limited. Decoded values are nested so little that recursion over them is safe: ``repr`` and
``json.dumps`` use Python's stack.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

__all__ = ["MAX_DEPTH", "MAX_VALUES", "decode", "shown"]

MAX_DEPTH = 256
"""How deeply lists and objects may be nested; JSON schemas of programs reach a few dozen."""

MAX_VALUES = 1 << 21
"""The most lists, objects and texts in one value. Numbers take little, and are not counted."""

_TEXT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_MAX_SHOWN_CHARS = 100


def decode(data: bytes | bytearray) -> Any:
    """Decodes a text.

    Raises:
        ValueError: it is not JSON, and where it is not, or it is nested too deeply, or has too many
            values.
    """
    num_brackets = data.count(b"[") + data.count(b"{")
    # Nearly all requests have fewer quotes and brackets, those in texts included.
    if data.count(b'"') // 2 + num_brackets > MAX_VALUES and _has_too_many_values(data):
        raise ValueError(f"it has more than {MAX_VALUES} lists, objects and texts")
    try:
        value = msgspec.json.decode(data)
    except RecursionError:
        raise _too_deep() from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from None
    # A value this deep has at least this many brackets. Nearly all requests have fewer, and need
    # not be walked.
    if num_brackets > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise _too_deep()
    return value


def shown(value: Any) -> str:
    """A value as errors quote it; of a long one, the beginning."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "..."


def _has_too_many_values(data: bytes | bytearray) -> bool:
    count = end = 0
    for text in _TEXT.finditer(data):
        begin = text.start()
        count += 1 + data.count(b"[", end, begin) + data.count(b"{", end, begin)
        if count > MAX_VALUES:
            return True
        end = text.end()
    return count + data.count(b"[", end) + data.count(b"{", end) > MAX_VALUES


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [each for each in level if type(each) is list or type(each) is dict]:
        depth += 1
        level = [
            child for each in level for child in (each.values() if type(each) is dict else each)
        ]
    return depth


def _too_deep() -> ValueError:
    return ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
