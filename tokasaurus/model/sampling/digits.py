"""Ends long runs of digits in JSON: a grammar lets a number go on, and some models never end one.

A double needs 17 significant digits and an exponent of three, a 64-bit integer 20 digits, so an
answer loses nothing. The library's grammars cannot say it: bounds and ``multipleOf`` exclude
exponents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from tokasaurus.protocol.arrays import Int32Array

__all__ = ["MAX_DIGITS", "DigitLimit", "JsonText"]

MAX_DIGITS = 20
"""After this many digits of JSON, outside its strings, no token that begins with one may follow."""
MAX_EXPONENT_DIGITS = 3
"""The same for an exponent."""

_QUOTE, _BACKSLASH = b'"\\'
_DIGITS, _SIGNS, _EXPONENTS = frozenset(b"0123456789"), frozenset(b"+-"), frozenset(b"eE")


class DigitLimit:
    """The limit, for one vocabulary.

    Args:
        tokens: the bytes of each id.
        num_words: 32-bit words of a mask.
    """

    def __init__(self, tokens: Sequence[bytes], num_words: int) -> None:
        self._tokens = tokens
        self._quoting = frozenset(
            i for i, token in enumerate(tokens) if b'"' in token or b"\\" in token
        )
        begins = np.zeros(num_words * 32, np.bool_)
        begins[[i for i, token in enumerate(tokens) if token[:1].isdigit()]] = True
        self._others: Int32Array = ~np.packbits(begins, bitorder="little").view(np.int32)

    def begin(self) -> JsonText:
        """The state before the first token."""
        return JsonText(self._tokens, self._quoting)

    def apply(self, text: JsonText, mask: Int32Array) -> None:
        """Takes digits out of a mask in place, unless the text is bound to have one."""
        if text.num_digits >= MAX_DIGITS:
            allowed = mask & self._others
            if allowed.any():
                mask[:] = allowed


class JsonText:
    """Where a text of JSON has come to.

    Attributes:
        num_digits: outside strings, since the last other character. An exponent begins at 17.
    """

    def __init__(self, tokens: Sequence[bytes], quoting: frozenset[int]) -> None:
        self._tokens = tokens
        # The tokens that may end a string or escape a character.
        self._quoting = quoting
        self._in_string = False
        self._escapes = False
        self.num_digits = 0

    def extend(self, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if not self._in_string or self._escapes or token_id in self._quoting:
                self._read(self._tokens[token_id])

    def _read(self, token: bytes) -> None:
        for byte in token:
            if self._escapes:
                self._escapes = False
            elif self._in_string:
                self._escapes = byte == _BACKSLASH
                self._in_string = byte != _QUOTE
            else:
                self._in_string = byte == _QUOTE
                if byte in _DIGITS:
                    self.num_digits += 1
                elif byte in _EXPONENTS:
                    self.num_digits = MAX_DIGITS - MAX_EXPONENT_DIGITS
                elif byte not in _SIGNS:
                    self.num_digits = 0
