"""Chat templates in the style of real models, and conversations for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["CONVERSATIONS", "DOCUMENTS", "TEMPLATES", "TOOLS"]

TEMPLATES: Mapping[str, str] = {
    path.stem: path.read_text()
    for path in sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))
}

_SYSTEM = {"role": "system", "content": "Be kind.\n"}
_HI = {"role": "user", "content": '  Hi <b>you</b> & "me" — 日本 {{ 7 * 7 }}'}
_HELLO = {"role": "assistant", "content": "Hello there. "}
_ASKS = {"role": "user", "content": "What is 2 + 2?"}
_CALL = {"id": "call12345", "type": "function"}
_CALLS: Sequence[Mapping[str, Any]] = [
    {**_CALL, "function": {"name": "add", "arguments": {"a": 2, "b": [1, "x"]}}}
]
_RESULT = {"role": "tool", "content": "4", "tool_call_id": "call12345", "name": "add"}

CONVERSATIONS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "short": [_HI],
    "system": [_SYSTEM, _HI],
    "long": [_SYSTEM, _HI, _HELLO, _ASKS, {"role": "assistant", "content": "4"}, _HI],
    "prefilled": [_HI, _HELLO],
    "stripped": [_HI, {"role": "assistant", "content": " It  is  "}],
    "calls": [_SYSTEM, _ASKS, {"role": "assistant", "tool_calls": _CALLS}, _RESULT],
    "null": [_ASKS, {"role": "assistant", "content": None, "tool_calls": _CALLS}, _RESULT, _RESULT],
    "reasoning": [
        _ASKS,
        {"role": "assistant", "content": "4", "reasoning_content": "two and two"},
        _HI,
        {"role": "assistant", "content": "Ho", "reasoning": "short"},
    ],
    "thoughts": [_ASKS, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"}, _HI],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "so"}]},
    ],
    "martian": [{"role": "martian", "content": "Beep"}],
}

TOOLS: Sequence[Mapping[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds <two> numbers é.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "description": "first"},
                    "b": {"type": ["string", "number"]},
                    "c": {"type": "object", "additionalProperties": {"type": "boolean"}},
                },
                "required": ["a"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "now",
            "description": "The time.",
            "parameters": {"type": "object", "properties": {}},
        },
    },
]

DOCUMENTS: Sequence[Mapping[str, str]] = [{"title": "One", "text": "Text <1>"}]
