"""The parts of an answer, as OpenAI's messages and deltas write them."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from tokasaurus.server.protocols.tools.call_reader import CallBegins
from tokasaurus.server.protocols.tools.parsing import AnswerParser, Text
from tokasaurus.server.protocols.tools.reasoning import Reasoning

__all__ = ["AnswerDeltas"]


class AnswerDeltas:
    """One answer while it grows.

    Args:
        parser: of its text.
    """

    def __init__(self, parser: AnswerParser) -> None:
        self._parser = parser
        self._num_calls = 0

    @property
    def num_reasoning_tokens(self) -> int:
        """The reasoning tokens among the tokens so far."""
        return self._parser.num_reasoning_tokens

    def message(self, text: str, token_ids: Sequence[int]) -> dict[str, Any]:
        """The message of a whole answer. Its content is null if there are only calls."""
        delta = self.delta(text, token_ids, final=True)
        calls = delta.get("tool_calls", [])
        message: dict[str, Any] = {"role": "assistant", "content": delta.get("content")}
        if not calls:
            message["content"] = message["content"] or ""
        if "reasoning_content" in delta:
            message["reasoning_content"] = delta["reasoning_content"]
        if calls:
            message["tool_calls"] = [
                {name: value for name, value in call.items() if name != "index"} for call in calls
            ]
        return message

    def delta(self, text: str, token_ids: Sequence[int], *, final: bool) -> dict[str, Any]:
        """The delta for the next piece of text and its tokens, with one entry for each call."""
        content, reasoning = "", ""
        calls: dict[int, dict[str, Any]] = {}
        for part in self._parser.feed(text, token_ids, final=final):
            if isinstance(part, Text):
                content += part.text
            elif isinstance(part, Reasoning):
                reasoning += part.text
            elif isinstance(part, CallBegins):
                index = self._num_calls
                self._num_calls += 1
                calls[index] = {
                    "index": index,
                    "id": f"call_{uuid.uuid4().hex[:24]}",
                    "type": "function",
                    "function": {"name": part.name, "arguments": ""},
                }
            else:
                index = self._num_calls - 1
                call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                call["function"]["arguments"] += part.json
        delta: dict[str, Any] = {}
        if content:
            delta["content"] = content
        if reasoning:
            delta["reasoning_content"] = reasoning
        if calls:
            delta["tool_calls"] = list(calls.values())
        return delta

    def finish_reason(self, reason: str | None) -> str | None:
        """The finish reason: an answer with a call ends with "tool_calls", not "stop"."""
        return "tool_calls" if reason == "stop" and self._num_calls else reason
