"""Packs documents into blocks of token ids, with a loss weight for each token."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from transformers import PreTrainedTokenizerFast

from tokasaurus.demo.corpus import Mixture, documents
from tokasaurus.demo.corpus.document import Chat, Document
from tokasaurus.demo.tokenizer import BOS, END, PAD, ROLES, render

PROMPT_WEIGHT = 0.1
"""The loss weight of users' words. It is low, since most of them are drawn at random."""

_POOL = 256


@dataclass(frozen=True)
class Encoded:
    ids: list[int]
    weights: list[float]


class Packer:
    """Fills blocks of ``length`` tokens with whole documents: always the largest that still fits.

    ::

        | <bos> doc .......... | <bos> doc .. | <bos> doc ..... | pad |
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, length: int, mixture: Mixture) -> None:
        self._tokenizer = tokenizer
        self._length = length
        self._mixture = mixture
        ids = {
            token: tokenizer.convert_tokens_to_ids(token)
            for token in (BOS, END, PAD, *(f"<|{r}|>" for r in ROLES))
        }
        self._bos, self._end, self._pad = ids[BOS], ids[END], ids[PAD]
        self._roles = {ids[f"<|{role}|>"] for role in ROLES}
        self._assistant = ids["<|assistant|>"]

    def batches(self, seed: int, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields ``(ids, weights)``, both ``[size, length]``."""
        blocks = self._blocks(seed)
        while True:
            batch = list(islice(blocks, size))
            yield torch.tensor([b.ids for b in batch]), torch.tensor([b.weights for b in batch])

    def _encode(self, batch: list[Document]) -> list[Encoded]:
        encoded = self._tokenizer([render(d) for d in batch], add_special_tokens=False)["input_ids"]
        return [
            Encoded(ids, self.weigh(d, ids))
            for d, ids in zip(batch, encoded, strict=True)
            if len(ids) <= self._length
        ]

    def weigh(self, document: Document, ids: list[int]) -> list[float]:
        """The loss weight of each token: 1 for the assistant's words and for plain text."""
        if not isinstance(document, Chat):
            return [0.0 if token == self._bos else 1.0 for token in ids]
        weights, answering = [], False
        for token in ids:
            structure = (
                token == self._bos or token in self._roles or (token == self._end and not answering)
            )
            weights.append(0.0 if structure else 1.0 if answering else PROMPT_WEIGHT)
            if token in self._roles:
                answering = token == self._assistant
        return weights

    def _blocks(self, seed: int) -> Iterator[Encoded]:
        stream = documents(seed, self._length, self._mixture)
        pool: list[Encoded] = []
        while True:
            if len(pool) < _POOL:
                pool += self._encode(list(islice(stream, _POOL)))
                pool.sort(key=lambda item: len(item.ids))
            yield self._fill(pool)

    def _fill(self, pool: list[Encoded]) -> Encoded:
        """Takes documents out of ``pool``: one from its middle, then the largest that fit."""
        ids: list[int] = []
        weights: list[float] = []
        index: int | None = len(pool) // 2
        while index is not None:
            item = pool.pop(index)
            ids += item.ids
            weights += item.weights
            index = _last_that_fits(pool, self._length - len(ids))
        missing = self._length - len(ids)
        return Encoded(ids + [self._pad] * missing, weights + [0.0] * missing)


def _last_that_fits(pool: list[Encoded], room: int) -> int | None:
    """The index of the largest document that fits, in a pool that is sorted by length."""
    index = bisect_right(pool, room, key=lambda item: len(item.ids)) - 1
    return index if index >= 0 else None
