"""Reads one tool call, ``{"name": ..., "arguments": {...}}``, while it is being written.

The name is known as soon as it is complete. The arguments are handed on piece by piece, just as the
model writes them; if they come before the name, they wait for it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

__all__ = ["ArgumentsPiece", "CallBegins", "CallReader"]

_WHITESPACE = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True)
class CallBegins:
    """A call of this function begins; its arguments follow."""

    name: str


@dataclass(frozen=True)
class ArgumentsPiece:
    """The next piece of the arguments, as JSON, of the call that began last."""

    json: str


class _ValueEnd:
    """Finds the end of a JSON value that comes in pieces.

    Attributes:
        is_broken: the value breaks off before it is complete, at a mark that JSON never has.
    """

    def __init__(self) -> None:
        self.is_broken = False
        self._depth = 0
        self._in_string = self._escaped = False
        self._is_scalar: bool | None = None

    def find(self, text: str, start: int) -> int | None:
        """The index after the value's last character; None if that has not come yet."""
        for index in range(start, len(text)):
            character = text[index]
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
                    if self._depth == 0:
                        return index + 1
                continue
            if self._is_scalar:
                if character in ",}]<" or character in _WHITESPACE:
                    return index
                continue
            if character == '"':
                self._in_string = True
            elif character == "<":
                self.is_broken = True
                return index
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return index + 1
            elif self._depth == 0:
                self._is_scalar = True
        return None


class CallReader:
    """One call while it is being written.

    Attributes:
        raw: everything that was fed.
        name: of the function, once known.
        is_done: the call is complete; ``rest`` came after it.
        is_broken: without a name, the text is not a call. With a name, the call breaks off, and
            ``rest`` does not belong to it.
    """

    def __init__(self) -> None:
        self.raw = ""
        self.name: str | None = None
        self.is_done = self.is_broken = False
        self._at = 0  # read so far
        self._end = 0  # of the part that was understood
        self._key: str | None = None
        self._key_scan: tuple[int, _ValueEnd] | None = None  # where the key began
        self._value: tuple[int, _ValueEnd] | None = None  # where the value began
        self._opened = False
        self._had_arguments = False
        self._early_arguments: str | None = None

    @property
    def rest(self) -> str:
        """The text after the call, or after the part of it that was understood."""
        return self.raw[self._at if self.is_done else self._end :]

    def finish(self) -> list[ArgumentsPiece]:
        """Nothing follows: gives the arguments that would have been handed on at their end."""
        if self.name is None or self._value is None or self._key not in _ARGUMENTS:
            return []
        start = self._value[0]
        return [] if start < 0 or self._streams(start) else [ArgumentsPiece(self.raw[start:])]

    def feed(self, text: str) -> list[CallBegins | ArgumentsPiece]:
        """Takes the next text. It must not be called when the call is done or broken."""
        self.raw += text
        parts: list[CallBegins | ArgumentsPiece] = []
        while not (self.is_done or self.is_broken) and self._advance(parts):
            pass
        return parts

    def _advance(self, parts: list[CallBegins | ArgumentsPiece]) -> bool:
        """One step; returns whether there may be another."""
        if self._value is not None:
            return self._read_value(parts)
        if self._key_scan is not None:
            return self._read_key(*self._key_scan)
        while self._at < len(self.raw) and self.raw[self._at] in _WHITESPACE:
            self._at += 1
        if self._at == len(self.raw):
            return False
        character = self.raw[self._at]
        if not self._opened:
            return self._expect("{")
        if self._key is not None and character == ":":
            self._at += 1
            self._value = (-1, _ValueEnd())
            return True
        if self._key is not None:
            self.is_broken = True
            return False
        if character == "}":
            self._at += 1
            self._finish(parts)
            return False
        if character == ",":
            self._at += 1
            self._end = self._at
            return True
        self.is_broken = character != '"'
        self._key_scan = (self._at, _ValueEnd())
        return not self.is_broken

    def _expect(self, character: str) -> bool:
        self._opened = self.raw[self._at] == character
        self.is_broken = not self._opened
        self._at += 1
        return self._opened

    def _read_key(self, start: int, scanner: _ValueEnd) -> bool:
        end = scanner.find(self.raw, self._at)
        self._at = len(self.raw) if end is None else end
        if end is None:
            return False
        key = _loads(self.raw[start:end])
        self._key, self._key_scan = (key if isinstance(key, str) else ""), None
        return True

    def _read_value(self, parts: list[CallBegins | ArgumentsPiece]) -> bool:
        assert self._value is not None
        start, scanner = self._value
        if start < 0:
            while self._at < len(self.raw) and self.raw[self._at] in _WHITESPACE:
                self._at += 1
            if self._at == len(self.raw):
                return False
            start = self._at
            self._value = (start, scanner)
        streams = self._streams(start)
        end = scanner.find(self.raw, self._at)
        before, self._at = self._at, len(self.raw) if end is None else end
        if streams:
            self._had_arguments = True
            parts.append(ArgumentsPiece(self.raw[before : self._at]))
        if end is None:
            return False
        if scanner.is_broken:
            self._end = self._at if streams else self._end
            self.is_broken = True
            return False
        if not streams:
            self._take_value(self.raw[start:end], parts)
        self._end = self._at
        self._key = self._value = None
        return True

    def _streams(self, start: int) -> bool:
        """Whether the value that begins there is handed on while it comes."""
        return self._key in _ARGUMENTS and self.name is not None and self.raw[start] == "{"

    def _take_value(self, value: str, parts: list[CallBegins | ArgumentsPiece]) -> None:
        if self._key in _ARGUMENTS:
            inner = _loads(value)
            # Some models write the arguments as a string of JSON.
            self._early_arguments = inner if isinstance(inner, str) else value
        elif self._key == "name" and self.name is None:
            name = _loads(value)
            if not isinstance(name, str) or not name:
                self.is_broken = True
                return
            self.name = name
            parts.append(CallBegins(name))
        if self.name is not None and self._early_arguments is not None:
            parts.append(ArgumentsPiece(self._early_arguments))
            self._early_arguments, self._had_arguments = None, True

    def _finish(self, parts: list[CallBegins | ArgumentsPiece]) -> None:
        self.is_done = self.name is not None
        self.is_broken = not self.is_done
        if self.is_done and not self._had_arguments:
            parts.append(ArgumentsPiece("{}"))


def _loads(text: str) -> object:
    """Decoded JSON; None if it is wrong, or a string with half a surrogate pair.

    No answer can hold such a string.
    """
    try:
        value: object = json.loads(text)
        if isinstance(value, str):
            value.encode()
    except (ValueError, RecursionError):
        return None
    return value
