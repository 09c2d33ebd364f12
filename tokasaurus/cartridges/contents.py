"""A cartridge's tensors as a file has them, before anything is copied. No torch.

Numbers stay what they are in the file: arrays of whole numbers with the same bits, since NumPy has
no bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["ITEM_BYTES", "Bits", "Contents", "Layer", "Piece", "Refusal", "quoted"]

Bits: TypeAlias = NDArray[np.unsignedinteger[Any]]

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_LONGEST_QUOTE = 80


class Refusal(Exception):
    """The file is no cartridge, or one that is not taken; says why, and what to do."""


def quoted(text: object) -> str:
    """Something that the file says, safe to print and short."""
    shown = ascii(str(text))
    return shown if len(shown) <= _LONGEST_QUOTE else f"{shown[:_LONGEST_QUOTE]}..."


@dataclass(frozen=True)
class Piece:
    """Consecutive positions of one layer's keys or values.

    Attributes:
        bits: [tokens, kv_heads, head_dim] uint16 or uint32, with any strides.
        dtype: what the bits mean: "BF16", "F16" or "F32".
    """

    bits: Bits
    dtype: str

    @property
    def num_tokens(self) -> int:
        return len(self.bits)


Layer: TypeAlias = "tuple[Sequence[Piece], Sequence[Piece]]"
"""The keys and the values of a layer; pieces in the order of their positions."""


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        layout: in words.
        layers: all of them, each with at least one piece of keys and of values.
        num_frozen: positions that were not trained, which come first.
        model: the name of the model that the file was made for; "" if it does not say.
        rope: as ``ModelShape.rope``.
        tokenizer: as ``CartridgeMetadata.tokenizer``.
        digest: of the tensors, as the file says; "" if it does not.
    """

    layout: str
    layers: Sequence[Layer]
    num_frozen: int = 0
    model: str = ""
    rope: str = ""
    tokenizer: str = ""
    digest: str = ""

    def pieces(self) -> list[tuple[str, Sequence[Piece]]]:
        """The tensors in their canonical order, with their names in messages."""
        return [
            (f"{kind} of layer {layer}", pieces)
            for layer, both in enumerate(self.layers)
            for kind, pieces in zip(("the keys", "the values"), both, strict=True)
        ]
