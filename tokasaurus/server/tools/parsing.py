"""Finds reasoning and tool calls in the text of an answer while it grows.

A parser takes text in pieces of any size and gives parts; joined by kind, they are the same however the text
was cut. What may turn out to be a mark waits until that is known. A text that looks like a call and is none
is text in the end: nothing that the model said is lost.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from tokasaurus.server.tools.call_reader import ArgumentsPiece, CallBegins, CallReader

__all__ = [
    "AnswerParser",
    "HermesParser",
    "Llama3Parser",
    "Part",
    "Reasoning",
    "Text",
    "ToolParser",
]

_CALL, _END_OF_CALL = "<tool_call>", "</tool_call>"
_THINK, _END_OF_THINK = "<think>", "</think>"
_PYTHON_TAG = "<|python_tag|>"


@dataclass(frozen=True)
class Text:
    """What the user is to read."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """What the model thinks."""

    text: str


Part: TypeAlias = Text | Reasoning | CallBegins | ArgumentsPiece


class ToolParser(Protocol):
    """How one family of models writes calls."""

    def feed(self, text: str, *, final: bool) -> list[Part]:
        """Takes what comes next; ``final`` if nothing follows."""


class HermesParser:
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, any number of times, between text."""

    def __init__(self) -> None:
        self._pending = ""
        self._reader: CallReader | None = None
        self._after_call = False
        self._space = ""  # before the mark, which is text where that begins no call

    def feed(self, text: str, *, final: bool) -> list[Part]:
        parts: list[Part] = []
        self._pending += text
        while self._step(parts, final):
            pass
        return parts

    def _step(self, parts: list[Part], final: bool) -> bool:
        if self._reader is None:
            return self._read_text(parts, final)
        if not (self._reader.is_done or self._reader.is_broken):
            pending, self._pending = self._pending, ""
            parts += self._reader.feed(pending)
            if self._reader.is_done:
                self._pending = self._reader.rest
            elif self._reader.is_broken:
                self._pending = self._reader.raw
        return self._close(parts, final)

    def _read_text(self, parts: list[Part], final: bool) -> bool:
        before, mark, after = self._pending.partition(_CALL)
        if mark:
            self._text(text := before.rstrip(), parts)
            self._space = "" if self._after_call else before[len(text) :]
            self._pending, self._reader = after, CallReader()
            return True
        # White space waits too: before a call and behind one it is no text.
        kept = (
            len(before) if final else len((before[: len(before) - _held(before, _CALL)]).rstrip())
        )
        self._text(before[:kept], parts)
        self._pending = before[kept:]
        return False

    def _text(self, text: str, parts: list[Part]) -> None:
        if self._after_call:
            text = text.lstrip()
        if text:
            self._after_call = False
            parts.append(Text(text))

    def _close(self, parts: list[Part], final: bool) -> bool:
        """Looks for the end of the call that was read, or of what is none."""
        reader = self._reader
        assert reader is not None
        if not (reader.is_done or reader.is_broken):
            if final and reader.name is None:
                parts.append(Text(self._space + _CALL + reader.raw))
            return False
        before, mark, after = self._pending.partition(_END_OF_CALL)
        is_call = reader.name is not None
        if is_call and (begin := before.find(_CALL)) >= 0:  # its closing mark was forgotten
            self._pending, self._reader, self._after_call = self._pending[begin:], None, True
            return True
        if mark:
            if not is_call:
                parts.append(Text(self._space + _CALL + before + mark))
            self._pending, self._reader, self._after_call = after, None, is_call
            return True
        if final and not is_call:
            parts.append(Text(self._space + _CALL + self._pending))
        return False


class Llama3Parser:
    """``{"name": ..., "parameters": {...}}`` as the whole answer, several with semicolons between them.

    Args:
        names: of the functions there are: JSON with another name is an answer.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._pending = ""
        self._reader: CallReader | None = None
        self._waiting: list[Part] = []  # of a call, until its name is known to be one
        self._is_text = self._had_call = False

    def feed(self, text: str, *, final: bool) -> list[Part]:
        parts: list[Part] = []
        self._pending += text
        while self._step(parts, final):
            pass
        return parts

    def _step(self, parts: list[Part], final: bool) -> bool:
        if self._is_text:
            if self._pending:
                parts.append(Text(self._pending))
            self._pending = ""
            return False
        if self._reader is None:
            return self._begin(final)
        pending, self._pending = self._pending, ""
        found = self._reader.feed(pending)
        if self._reader.name is not None and self._reader.name not in self._names:
            self._reader.is_broken = True
        elif self._reader.name is not None:
            parts += found
        if self._reader.is_done and not self._reader.is_broken:
            self._pending, self._reader, self._had_call = self._reader.rest, None, True
            return True
        if (self._reader.is_broken or final) and self._reader.name not in self._names:
            self._pending, self._is_text = self._reader.raw, True
            return True
        return False

    def _begin(self, final: bool) -> bool:
        """Waits for what a call begins with."""
        text = self._pending.lstrip(" \t\r\n;" if self._had_call else " \t\r\n")
        text = text.removeprefix(_PYTHON_TAG).lstrip()
        if text.startswith("{"):
            self._pending, self._reader = text, CallReader()
            return True
        if text and not _PYTHON_TAG.startswith(text):
            if self._had_call:
                self._pending = text
            self._is_text = True
            return True
        if final and not self._had_call:
            self._is_text = True
            return True
        return False


class _ReasoningParser:
    """``<think>...</think>`` at the beginning of an answer.

    Args:
        inside: the prompt has opened it.
    """

    def __init__(self, inside: bool) -> None:
        self._inside = inside
        self._begun = inside  # whether it is known if there is any
        self._done = False
        self._pending = ""
        self._strips = True  # white space at the beginning

    def feed(self, text: str, *, final: bool) -> tuple[str, str]:
        """Takes what comes next; returns what is reasoning, and what follows it."""
        if self._done:
            return "", self._after(text)
        self._pending += text
        if not self._begun:
            start = self._pending.lstrip()
            if start.startswith(_THINK):
                self._inside = self._begun = True
                self._pending = start[len(_THINK) :]
            elif final or not _THINK.startswith(start):
                self._done, self._strips = True, False
                return "", self._pending
            else:
                return "", ""
        before, mark, after = self._pending.partition(_END_OF_THINK)
        if mark:
            self._done = True
            reasoning = self._thought(before.rstrip())
            self._strips = True
            return reasoning, self._after(after)
        kept = before[: len(before) - _held(before, _END_OF_THINK)] if not final else before
        kept = kept.rstrip()  # it may be the last white space before the mark
        self._pending = before[len(kept) :]
        return self._thought(kept), ""

    def _thought(self, text: str) -> str:
        if self._strips:
            text = text.lstrip()
            self._strips = not text
        return text

    def _after(self, text: str) -> str:
        if self._strips:
            text = text.lstrip()
            self._strips = not text
        return text


class AnswerParser:
    """The parts of one answer.

    Args:
        tools: finds its calls; None if it may have none.
        reasons: it may begin with reasoning.
        inside: it begins within it.
        max_calls: those beyond are left out.
    """

    def __init__(
        self, tools: ToolParser | None, *, reasons: bool, inside: bool, max_calls: int | None
    ) -> None:
        self._tools = tools
        self._reasoning = _ReasoningParser(inside) if reasons else None
        self._max_calls = max_calls
        self._num_calls = 0

    def feed(self, text: str, *, final: bool) -> list[Part]:
        """Takes what comes next; ``final`` if nothing follows."""
        parts: list[Part] = []
        if self._reasoning is not None:
            reasoning, text = self._reasoning.feed(text, final=final)
            if reasoning:
                parts.append(Reasoning(reasoning))
        if self._tools is None:
            return [*parts, Text(text)] if text else parts
        for part in self._tools.feed(text, final=final):
            if isinstance(part, CallBegins):
                self._num_calls += 1
            is_of_call = isinstance(part, (CallBegins, ArgumentsPiece))
            if not (is_of_call and self._max_calls and self._num_calls > self._max_calls):
                parts.append(part)
        return parts


def _held(text: str, mark: str) -> int:
    """How many characters at the end of a text may begin the mark."""
    for count in range(min(len(mark) - 1, len(text)), 0, -1):
        if mark.startswith(text[-count:]):
            return count
    return 0
