"""The training corpus: an endless, seeded stream of documents, made while it is read."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from tokasaurus.demo.corpus import arithmetic, copying, dinosaurs, passages, talk
from tokasaurus.demo.corpus.document import Document, Family, weighted

__all__ = [
    "CALCULATOR",
    "COPYING_FIRST",
    "EXPRESSIONS",
    "PATTERNS",
    "WORKED_SUMS",
    "Mixture",
    "documents",
]

Mixture = list[tuple[float, Family]]
"""The shares of families, in documents and not in tokens: passages are longer than chats."""

COPYING_FIRST: Mixture = [
    (56, talk.chat),
    (1, talk.ruled_chat),
    (22, passages.chat),
    (3, passages.plain_text),
    (8, copying.pattern_text),
    (3, copying.sentence_text),
    (4, dinosaurs.plain_text),
    (3, arithmetic.plain_text),
]

# For a model that can copy: sums that are worked out, and more of what it learned most slowly.
WORKED_SUMS: Mixture = [
    (46, talk.chat_with_worked_sums),
    (1, talk.ruled_chat),
    (19, passages.chat),
    (2, passages.plain_text),
    (3, copying.pattern_text),
    (1, copying.sentence_text),
    (8, copying.pattern_chat),
    (5, copying.blend_chat),
    (4, copying.blend_text),
    (3, dinosaurs.plain_text),
    (20, arithmetic.drill),
]

# A tool for sums that are too large to know, beside everything from before.
CALCULATOR: Mixture = [
    (34, talk.calculator_chat),
    (4, talk.toolless_chat),
    (30, talk.chat_with_worked_sums),
    (1, talk.ruled_chat),
    (13, passages.chat),
    (1, passages.plain_text),
    (2, copying.pattern_text),
    (1, copying.sentence_text),
    (6, copying.pattern_chat),
    (3, copying.blend_chat),
    (2, copying.blend_text),
    (2, dinosaurs.plain_text),
    (8, arithmetic.drill),
]

# The same without functions of two numbers, which the model does not learn.
EXPRESSIONS: Mixture = [
    (weight, talk.expression_chat if make is talk.calculator_chat else make)
    for weight, make in CALCULATOR
]

# The same kinds, with more of what the calculator displaced: patterns in chat, and passages.
PATTERNS: Mixture = [
    (14, talk.expression_chat),
    (2, talk.toolless_chat),
    (22, talk.chat_with_worked_sums),
    (1, talk.ruled_chat),
    (15, passages.chat),
    (1, passages.plain_text),
    (2, copying.pattern_text),
    (1, copying.sentence_text),
    (20, copying.short_pattern_chat),
    (10, copying.pattern_chat),
    (2, copying.blend_chat),
    (1, copying.blend_text),
    (2, dinosaurs.plain_text),
    (5, arithmetic.drill),
]


def documents(seed: int, room: int = 256, mixture: Mixture = COPYING_FIRST) -> Iterator[Document]:
    """Yields documents for blocks of ``room`` tokens. The same seed gives the same documents."""
    rng = Random(seed)
    while True:
        yield weighted(rng, mixture)(rng, room)
