"""Training documents. Knows nothing of tokens: ``demo.tokenizer`` renders documents."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, TypeAlias, TypeVar

Role = Literal["system", "user", "assistant", "tool"]
T = TypeVar("T")

HELD_OUT_ONE_IN = 8


@dataclass(frozen=True)
class Call:
    """A call of a tool, which the assistant makes instead of saying something."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Message:
    role: Role
    content: str
    calls: tuple[Call, ...] = ()


Tool: TypeAlias = Mapping[str, Any]
"""A function that the assistant may call: its name, description and parameters, in that order."""


@dataclass(frozen=True)
class Chat:
    """A conversation, rendered through the chat template."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True)
class Text:
    """A plain document. ``ends`` is False if the text stops only because its block is full."""

    text: str
    ends: bool = True


Document = Chat | Text
Turns = list[Message]
Family = Callable[[Random, int], Document]
"""Makes a document from a source of random numbers and the block length, in tokens, to fit."""


def exchange(user: str, assistant: str) -> Turns:
    return [Message("user", user), Message("assistant", assistant)]


def is_held_out(key: str) -> bool:
    """Whether an item is kept for evaluation. Its spelling decides, so no split file is needed."""
    return zlib.crc32(key.encode()) % HELD_OUT_ONE_IN == 0


def chance(rng: Random, probability: float) -> bool:
    return rng.random() < probability


def weighted(rng: Random, table: Sequence[tuple[float, T]]) -> T:
    """Draws a value of ``[(weight, value), ...]``."""
    return rng.choices([value for _, value in table], [weight for weight, _ in table])[0]


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def roughen(rng: Random, text: str) -> str:
    """Writes a question as people type it: sometimes without capitals or punctuation."""
    if chance(rng, 0.2):
        text = text.lower()
    elif chance(rng, 0.02):
        text = text.upper()
    if chance(rng, 0.2):
        text = text.rstrip("?.!")
    return text
