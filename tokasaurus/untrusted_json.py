"""JSON from clients, in requests and in lines of batches.

Decoded values are nested so little that recursion over them is safe: ``repr`` and ``json.dumps``
use Python's stack.
"""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["MAX_DEPTH", "decode", "shown"]

MAX_DEPTH = 256
"""How deeply lists and objects may be nested; JSON schemas of programs reach a few dozen."""

_MAX_SHOWN_CHARS = 100


def decode(data: bytes | bytearray) -> Any:
    """Decodes a text.

    Raises:
        ValueError: it is not JSON, and where it is not, or it is nested too deeply.
    """
    try:
        value = msgspec.json.decode(data)
    except RecursionError:
        raise _too_deep() from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from None
    # A value this deep has at least this many brackets. Nearly all requests have fewer, and need
    # not be walked.
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise _too_deep()
    return value


def shown(value: Any) -> str:
    """A value as errors quote it; of a long one, the beginning."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "..."


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
