"""A vocabulary of single letters and an end of sequence."""

from __future__ import annotations

import string

from tokasaurus.grammars import Vocabulary

LETTERS = string.ascii_lowercase
VOCABULARY = Vocabulary(
    tokens=[*(letter.encode() for letter in LETTERS), b"<end>"],
    special_token_ids=frozenset([len(LETTERS)]),
    eos_token_ids=(len(LETTERS),),
    encode=lambda text: [LETTERS.index(letter) for letter in text],
)
