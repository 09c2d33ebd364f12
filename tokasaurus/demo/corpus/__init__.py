"""The training corpus: an endless, seeded stream of documents, made up as it is read."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from tokasaurus.demo.corpus import arithmetic, copying, dinosaurs, passages, talk
from tokasaurus.demo.corpus.document import Document, Family, weighted

__all__ = ["MIXTURE", "documents"]

# Shares of documents, not of tokens: passages are several times as long as chats.
MIXTURE: list[tuple[float, Family]] = [
    (56, talk.chat),
    (1, talk.ruled_chat),
    (22, passages.chat),
    (3, passages.plain_text),
    (8, copying.pattern_text),
    (3, copying.sentence_text),
    (4, dinosaurs.plain_text),
    (3, arithmetic.plain_text),
]


def documents(seed: int, room: int = 256) -> Iterator[Document]:
    """Yields documents for blocks of ``room`` tokens; the same seed gives the same documents."""
    rng = Random(seed)
    while True:
        yield weighted(rng, MIXTURE)(rng, room)
