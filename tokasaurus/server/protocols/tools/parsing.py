"""Finds reasoning and tool calls in the text of an answer while it grows.

A parser takes text in pieces of any size and gives parts. Joined by kind, the parts are the same
however the text was cut. Text that may turn out to be a mark waits until that is known. Text that
only looks like a call is text in the end: nothing that the model said is lost.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from tokasaurus.server.protocols.tools.call_reader import ArgumentsPiece, CallBegins, CallReader
from tokasaurus.server.protocols.tools.reasoning import Reasoning, ReasoningParser, held

__all__ = [
    "AnswerParser",
    "HermesParser",
    "Llama3Parser",
    "Part",
    "Text",
    "ToolParser",
]

_CALL, _END_OF_CALL = "<tool_call>", "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"


@dataclass(frozen=True)
class Text:
    """Text for the user."""

    text: str


Part: TypeAlias = Text | Reasoning | CallBegins | ArgumentsPiece


class ToolParser(Protocol):
    """Finds the calls that one family of models writes."""

    def feed(self, text: str, *, final: bool) -> list[Part]:
        """Takes the next text; ``final`` if nothing follows."""


class HermesParser:
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, any number of times in text."""

    def __init__(self) -> None:
        self._pending = ""
        self._reader: CallReader | None = None
        self._after_call = False  # no text has come since a call
        self._is_open = False  # the closing mark of the last call has not come yet
        self._space = ""  # before the mark; it is text if no call follows the mark

    def feed(self, text: str, *, final: bool) -> list[Part]:
        parts: list[Part] = []
        self._pending += text
        while self._read_text(parts, final) if self._reader is None else self._read_call(parts):
            pass
        if final and self._reader is not None:
            is_call = self._reader.name is not None
            said = Text(self._space + _CALL + self._reader.raw)
            parts += self._reader.finish() if is_call else [said]
        return parts

    def _read_call(self, parts: list[Part]) -> bool:
        reader = self._reader
        assert reader is not None
        pending, self._pending = self._pending, ""
        parts += reader.feed(pending)
        if not (reader.is_done or reader.is_broken):
            return False
        self._reader = None
        if reader.name is None:
            parts.append(Text(self._space + _CALL))
            self._pending, self._after_call = reader.raw, False
        else:
            self._pending, self._after_call, self._is_open = reader.rest, True, True
        return True

    def _read_text(self, parts: list[Part], final: bool) -> bool:
        before, mark, after = self._pending.partition(_CALL)
        if self._is_open:
            inside, end, behind = before.partition(_END_OF_CALL)
            if end:
                self._text(inside.rstrip(), parts)
                self._pending, self._is_open = behind + mark + after, False
                return True
        if mark:
            self._text(text := before.rstrip(), parts)
            self._space = "" if self._after_call else before[len(text) :]
            self._pending, self._reader, self._is_open = after, CallReader(), False
            return True
        # White space waits too: before and after a call it is not text.
        num_held = held(before, _CALL)
        if self._is_open:
            num_held = max(num_held, num_end := held(before, _END_OF_CALL))
            if final:  # cut off
                before = before[: len(before) - num_end]
        kept = len(before) if final else len(before[: len(before) - num_held].rstrip())
        self._text(before[:kept], parts)
        self._pending = before[kept:]
        return False

    def _text(self, text: str, parts: list[Part]) -> None:
        if self._after_call:
            text = text.lstrip()
        if text:
            self._after_call = False
            parts.append(Text(text))


class Llama3Parser:
    """``{"name": ..., "parameters": {...}}`` as the whole answer, or several between semicolons.

    Args:
        names: of the functions; JSON with another name is text.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._pending = ""
        self._reader: CallReader | None = None
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
        reader = self._reader
        if reader.name in self._names:
            parts += found
            if reader.is_done or reader.is_broken:
                self._pending, self._reader, self._had_call = reader.rest.lstrip(), None, True
                self._is_text = reader.is_broken
                return True
            if final:
                parts += reader.finish()
        elif reader.name is not None or reader.is_broken or final:
            self._pending, self._is_text = reader.raw, True
            return True
        return False

    def _begin(self, final: bool) -> bool:
        """Waits for the beginning of a call."""
        text = self._pending.lstrip(" \t\r\n;" if self._had_call else " \t\r\n")
        call = text.removeprefix(_PYTHON_TAG).lstrip()
        if call.startswith("{"):
            self._pending, self._reader = call, CallReader()
            return True
        if final or (call and not _PYTHON_TAG.startswith(call)):
            if self._had_call:
                self._pending = text
            self._is_text = True
            return True
        return False


class AnswerParser:
    """Finds the parts of one answer.

    Args:
        tools: finds calls; None if there can be none.
        reasoning: finds the reasoning at the beginning; None if there can be none.
        max_calls: further calls are left out.
    """

    def __init__(
        self,
        tools: ToolParser | None,
        reasoning: ReasoningParser | None,
        max_calls: int | None = None,
    ) -> None:
        self._tools = tools
        self._reasoning = reasoning
        self._max_calls = max_calls
        self._num_calls = 0

    @property
    def num_reasoning_tokens(self) -> int:
        """The reasoning tokens among the tokens so far, including the marks."""
        return 0 if self._reasoning is None else self._reasoning.num_tokens

    def feed(self, text: str, token_ids: Sequence[int], *, final: bool) -> list[Part]:
        """Takes the next piece.

        Args:
            text: of the answer.
            token_ids: that came with the text, which may belong to earlier tokens.
            final: nothing follows.
        """
        parts: list[Part] = []
        if self._reasoning is not None:
            self._reasoning.count(token_ids)
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
