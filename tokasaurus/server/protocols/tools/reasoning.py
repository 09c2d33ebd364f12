"""Finds the reasoning at the beginning of an answer, and counts its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Reasoning", "ReasoningParser", "held"]

_THINK, _END_OF_THINK = "<think>", "</think>"
_END_BYTES = _END_OF_THINK.encode()


@dataclass(frozen=True)
class Reasoning:
    """The model's reasoning."""

    text: str


class ReasoningParser:
    """``<think>...</think>`` at the beginning of an answer.

    Args:
        inside: the prompt has opened the reasoning.
        visible: the bytes that each token adds to a text.
    """

    def __init__(self, inside: bool, visible: Sequence[bytes]) -> None:
        self._inside = inside
        self._begun = inside  # the answer has reasoning
        self._done = False
        self._pending = ""
        self._strips = True  # white space at the beginning
        self._visible = visible
        self._num_counted = 0
        self._end_of_bytes: bytes | None = b""  # None once the closing mark has come

    @property
    def num_tokens(self) -> int:
        """The tokens so far, up to the one that completed the closing mark; 0 without reasoning."""
        return self._num_counted if self._begun else 0

    def count(self, token_ids: Sequence[int]) -> None:
        """Takes the next tokens, before the text that they make or together with it.

        The mark is ASCII, so it stands in the bytes exactly where it stands in the text.
        """
        if self._end_of_bytes is None:
            return
        pieces = [self._visible[token_id] for token_id in token_ids]
        data = self._end_of_bytes + b"".join(pieces)
        begin = data.find(_END_BYTES)
        if begin < 0:
            self._num_counted += len(token_ids)
            self._end_of_bytes = data[1 - len(_END_BYTES) :]
            return
        at, end = len(self._end_of_bytes), begin + len(_END_BYTES)
        for piece in pieces:
            if at < end:
                self._num_counted += 1
                at += len(piece)
        self._end_of_bytes = None

    def feed(self, text: str, *, final: bool) -> tuple[str, str]:
        """Takes the next text; returns the reasoning in it, and the text after the reasoning."""
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
        kept = before[: len(before) - held(before, _END_OF_THINK)] if not final else before
        kept = kept.rstrip()  # the white space may be the last before the mark
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


def held(text: str, mark: str) -> int:
    """The number of characters at the end of a text that may begin the mark."""
    for count in range(min(len(mark) - 1, len(text)), 0, -1):
        if mark.startswith(text[-count:]):
            return count
    return 0
