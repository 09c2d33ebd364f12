"""A lower bound on the number of tokens of a text, without tokenizing it.

To tokenize takes some seconds and a hundred bytes for each megabyte and byte of text. So a text
that can never fit is refused by this bound. The bound never exceeds the number of tokens.

**Weights.** Each byte b of a text weighs 1 / (length of the longest token that has b). Then no
token weighs more than 1: each of its n bytes weighs at most 1 / n. So a text that the tokens spell
byte by byte has at least as many tokens as it weighs. A run of spaces weighs little, since
vocabularies have tokens of many spaces; words weigh more.

**Normalizers** change the text first. Most characters pass through each of the known ones
unchanged: those that the normalizer maps to themselves, unless a character follows that may be
composed with them. The others are *unsteady*. Canonical composition makes one character of at most
four, so an unsteady character weighs a quarter of what the lightest byte weighs.

**Whitespace** weighs nothing where an added token takes that beside it (``lstrip``, ``rstrip``).

There is no bound where tokens do not spell every byte: where unknown characters become one token or
none (WordPiece, or a vocabulary without all bytes), or where a normalizer or a pre-tokenizer that
is not known here may drop characters.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tokasaurus.text.token_bytes import byte_level_alphabet

__all__ = ["FewestTokens"]

_BLOCK = 1 << 16  # characters that are weighed at a time
_MOST_COMPOSED = 4  # characters in the longest canonical decomposition
_Form: TypeAlias = Literal["NFC", "NFD", "NFKC", "NFKD"]
_FORMS: tuple[_Form, ...] = ("NFC", "NFD", "NFKC", "NFKD")
_SURROGATES = range(0xD800, 0xE000)
_END_OF_LETTERS = 0x40000  # behind it are only marks, and planes without characters
_PRIVATE = 0xF0000  # the first code point of the planes for private use


class FewestTokens:
    """The bound of one tokenizer.

    Args:
        backend: a ``tokenizers.Tokenizer``.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def exceed(self, text: str, limit: int) -> int | None:
        """A number of tokens above a limit that a text has at least; None if there may be fewer."""
        if len(text) <= limit or self._weights is None:
            return None
        weights, composes = self._weights
        total = 0.0
        for start in range(0, len(text), _BLOCK):
            # One character more, to see what follows the last.
            block = text[start : start + _BLOCK + 1]
            codes = np.frombuffer(block.encode("utf-32-le", "replace"), np.uint32)
            found = weights[codes]
            if composes is not None:
                unsteady = composes[codes[1:]]
                found[:-1][unsteady] = np.minimum(found[:-1][unsteady], weights[_UNASSIGNED])
            total += float(found[:_BLOCK].sum(dtype=np.float64))
            if total > limit + 1:  # rounding errors are far below 1
                return int(total)
        return None

    @cached_property
    def _weights(self) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None] | None:
        """The weight of each character, and whether it may be composed with the one before it.

        The second is None where no normalizer composes; both are, where there is no bound.
        """
        pipeline = _Pipeline.of(self._backend)
        if pipeline is None:
            return None
        of_byte = _byte_weights(pipeline.tokens)
        weights = _character_weights(of_byte)
        weights[ord(" ")] = of_byte[list(pipeline.space.encode())].sum()
        if pipeline.strips:
            weights[_whitespace()] = 0.0
        if not (pipeline.forms or pipeline.lowers):
            return weights, None
        lightest = float(of_byte.min()) / _MOST_COMPOSED
        unsteady = _unsteady(pipeline.forms, pipeline.lowers)
        weights[unsteady] = np.minimum(weights[unsteady], lightest)
        weights[_UNASSIGNED] = lightest
        return weights, _composing()


_UNASSIGNED = 0x10FFFF
"""A code point that is never a character."""


@dataclass(frozen=True)
class _Pipeline:
    """What the bound has to know of a tokenizer.

    Attributes:
        tokens: what each spells, in bytes of the normalized text.
        strips: added tokens take whitespace beside them.
        space: what a space becomes before the model sees it.
        forms: Unicode normalization forms.
        lowers: characters are lowercased.
    """

    tokens: list[bytes]
    strips: bool
    space: str
    forms: tuple[_Form, ...]
    lowers: bool

    @staticmethod
    def of(backend: Any) -> _Pipeline | None:
        """The pipeline of a tokenizer; None if there is no bound for it."""
        normalizers = _steps(backend.normalizer, "normalizers")
        pre_tokenizers = _steps(backend.pre_tokenizer, "pretokenizers")
        if not all(map(_keeps_characters, [*normalizers, *pre_tokenizers])):
            return None
        tokens = _spelled(backend, any(each["type"] == "ByteLevel" for each in pre_tokenizers))
        if tokens is None:
            return None
        added = backend.get_added_tokens_decoder().values()
        tokens += [token.content.encode() for token in added]
        if backend.normalizer is not None:
            tokens += [backend.normalizer.normalize_str(each.content).encode() for each in added]
        space = " "
        for each in [*normalizers, *pre_tokenizers]:
            if each["type"] == "Replace":
                space = each["content"] if space == " " else space
            elif each["type"] == "Metaspace":
                space = each["replacement"] if space == " " else space
        kinds = [each["type"] for each in normalizers]
        return _Pipeline(
            tokens=tokens,
            strips=any(token.lstrip or token.rstrip for token in added),
            space=space,
            forms=tuple(form for form in _FORMS if form in kinds),
            lowers="Lowercase" in kinds,
        )


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence of sequences."""

    def flat(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if step["type"] == "Sequence":
            for each in step[name]:
                yield from flat(each)
        else:
            yield step

    return [] if part is None else list(flat(json.loads(part.__getstate__())))


def _keeps_characters(step: dict[str, Any]) -> bool:
    """Whether a step of the pipeline is known, and drops no character of the text."""
    kind = step["type"]
    if kind == "Replace":
        return bool(step["pattern"] == {"String": " "} and step["content"] != "")
    if kind in ("Split", "Punctuation"):
        return bool(step["behavior"] != "Removed")
    return kind in (*_FORMS, "Lowercase", "Prepend", "ByteLevel", "Metaspace", "Digits")


def _spelled(backend: Any, is_byte_level: bool) -> list[bytes] | None:
    """What the model's tokens spell; None if they do not spell every byte."""
    if type(backend.model).__name__ not in ("BPE", "Unigram"):
        return None
    names = backend.get_vocab(with_added_tokens=False)
    if is_byte_level:
        alphabet = byte_level_alphabet()
        if not names.keys() >= alphabet.keys():
            return None
        return [
            bytes(map(alphabet.__getitem__, name))
            for name in names
            if all(map(alphabet.__contains__, name))
        ]
    falls_back = json.loads(backend.model.__getstate__()).get("byte_fallback", False)
    if not falls_back or not all(f"<0x{byte:02X}>" in names for byte in range(256)):
        return None
    return [name.encode() for name in names]


def _byte_weights(tokens: list[bytes]) -> NDArray[np.float32]:
    longest = np.ones(256, np.int64)
    lengths = np.array([len(token) for token in tokens], np.int64)
    data = np.frombuffer(b"".join(tokens), np.uint8)
    np.maximum.at(longest, data, np.repeat(lengths, lengths))
    return (1 / longest).astype(np.float32)


def _character_weights(of_byte: NDArray[np.float32]) -> NDArray[np.float32]:
    """The weight of each code point: of its bytes in UTF-8; 0 for surrogates."""
    codes = np.arange(sys.maxunicode + 1)
    weights: NDArray[np.float32] = of_byte[codes & 0x7F]
    # (first code with this many bytes, number of bytes, mark of the first byte)
    for first, num_bytes, mark in ((0x80, 2, 0xC0), (0x800, 3, 0xE0), (0x10000, 4, 0xF0)):
        rest = codes[first:]
        weights[first:] = of_byte[rest >> 6 * (num_bytes - 1) & 0x3F | mark]
        for place in range(num_bytes - 1):
            weights[first:] += of_byte[(rest >> 6 * place) & 0x3F | 0x80]
    weights[_SURROGATES.start : _SURROGATES.stop] = 0.0
    return weights


def _whitespace() -> list[int]:
    return [code for code in range(_END_OF_LETTERS) if chr(code).isspace()]


@lru_cache
def _unsteady(forms: tuple[_Form, ...], lowers: bool) -> NDArray[np.bool_]:
    """The characters that change, or that may be composed with others."""
    found: NDArray[np.bool_] = _composing().copy()
    for code in range(_END_OF_LETTERS):
        character = chr(code)
        if any(unicodedata.normalize(form, character) != character for form in forms) or (
            lowers and character.lower() != character
        ):
            found[code] = True
    return found


@lru_cache
def _composing() -> NDArray[np.bool_]:
    """The characters that normalization may merge into the one before them.

    A later version of Unicode may have such a character where this one has none.
    """
    found = np.zeros(sys.maxunicode + 1, np.bool_)
    found[_END_OF_LETTERS:_PRIVATE] = True
    for code in range(_END_OF_LETTERS):
        character = chr(code)
        if unicodedata.category(character) == "Cn" or unicodedata.combining(character):
            found[code] = True
        else:
            parts = unicodedata.decomposition(character).split()
            if len(parts) == 2 and parts[0][0] != "<":
                found[int(parts[1], 16)] = True
    found[0x1161:0x1176] = found[0x11A8:0x11C3] = True  # vowels and finals of Hangul
    return found
