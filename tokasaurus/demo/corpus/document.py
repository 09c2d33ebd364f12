"""What a training document is. Knows nothing of tokens: rendering belongs to ``demo.tokenizer``."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, TypeVar

Role = Literal["system", "user", "assistant"]
T = TypeVar("T")

HELD_OUT_ONE_IN = 8


@dataclass(frozen=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True)
class Chat:
    """A conversation, rendered through the chat template."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Text:
    """A plain document. ``ends`` is false for text that stops only because its block is full."""

    text: str
    ends: bool = True


Document = Chat | Text
Turns = list[Message]
Family = Callable[[Random, int], Document]
"""Makes one document from a source of randomness and the block length in tokens it should fit."""


def exchange(user: str, assistant: str) -> Turns:
    return [Message("user", user), Message("assistant", assistant)]


def is_held_out(key: str) -> bool:
    """Whether an item is kept for evaluation: fixed by its spelling, so no split file is needed."""
    return zlib.crc32(key.encode()) % HELD_OUT_ONE_IN == 0


def chance(rng: Random, probability: float) -> bool:
    return rng.random() < probability


def weighted(rng: Random, table: Sequence[tuple[float, T]]) -> T:
    """One value of ``[(weight, value), ...]``."""
    return rng.choices([value for _, value in table], [weight for weight, _ in table])[0]


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def roughen(rng: Random, text: str) -> str:
    """Types a question the way people do: sometimes without capitals, sometimes unpunctuated."""
    if chance(rng, 0.2):
        text = text.lower()
    elif chance(rng, 0.02):
        text = text.upper()
    if chance(rng, 0.2):
        text = text.rstrip("?.!")
    return text
