"""The bytes that each id of a vocabulary adds to a text.

With this table, detokenizing is a look-up, a join and an incremental UTF-8 decoder, and no text is
decoded twice. It works for every tokenizer with a decoder that treats tokens one by one: byte-level
BPE, and SentencePiece with or without byte fallback. (If bytes are not UTF-8, only the number of
replacement characters may differ.) For any other kind, ``Tokenizer`` makes the table by decoding
each id after a fixed first token.
"""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["byte_level_alphabet", "bytes_from_decoder", "decoder_steps"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def decoder_steps(backend: Any) -> list[dict[str, Any]] | None:
    """The steps of a ``tokenizers`` decoder; None if one of them is unknown here.

    Args:
        backend: a ``tokenizers.Tokenizer``.
    """
    decoder = json.loads(backend.to_str())["decoder"]
    if decoder is None:
        return None
    steps: list[dict[str, Any]] = (
        decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    )
    return steps if all(_is_understood(step) for step in steps) else None


def _is_understood(step: dict[str, Any]) -> bool:
    if step["type"] == "Replace":
        return "String" in step["pattern"]
    if step["type"] == "Strip":  # strips the leading space of a text, which a continuation keeps
        return bool(step["stop"] == 0)
    return step["type"] in ("ByteLevel", "ByteFallback", "Fuse", "Metaspace")


def bytes_from_decoder(steps: list[dict[str, Any]], token: str) -> bytes:
    """The bytes that one token adds in the middle of a text."""
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel":
            return _byte_level(token)
        if kind == "ByteFallback" and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if kind == "Replace":
            token = token.replace(step["pattern"]["String"], step["content"])
        elif kind == "Metaspace":
            token = token.replace(step["replacement"], " ")
    return token.encode()


def _byte_level(token: str) -> bytes:
    """A token with a character outside the alphabet is an added token, and stands for itself."""
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode()


def byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE writes printable bytes as themselves, others as characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


_BYTE_OF_CHARACTER = byte_level_alphabet()
