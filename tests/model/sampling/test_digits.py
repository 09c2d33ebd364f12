"""The limit on runs of digits in JSON."""

from __future__ import annotations

import json
import string

import llguidance
import numpy as np
import torch
from slot_parameters import entering

from tokasaurus.grammars import Vocabulary
from tokasaurus.model.download import Download
from tokasaurus.model.sampling.digits import MAX_DIGITS, DigitLimit
from tokasaurus.model.sampling.matchers import Matchers
from tokasaurus.protocol.messages import SlotGrammar

TOKENS = [*string.printable, "77", '": ', '\\"', "<end>"]
END = len(TOKENS) - 1
IDS = {token: i for i, token in enumerate(TOKENS)}
VOCABULARY = Vocabulary(
    tokens=[token.encode() for token in TOKENS],
    special_token_ids=frozenset([END]),
    eos_token_ids=(END,),
    encode=lambda text: [IDS[letter] for letter in text],
)


def ids_of(text: str) -> list[int]:
    return [IDS[letter] for letter in text]


def num_digits(text: str, *tokens: str) -> int:
    state = DigitLimit(VOCABULARY.tokens, 4).begin()
    state.extend([*ids_of(text), *(IDS[token] for token in tokens)])
    return state.num_digits


def test_digits_are_counted_outside_strings():
    expected = {
        "123": 3,
        "-12.3456": 4,
        "1.5e1": MAX_DIGITS - 2,
        "1.5E-17": MAX_DIGITS - 1,
        "[1.5e17, -3": 1,
        "[true, 3": 1,
        '"123': 0,
        '"123"': 0,
        '"12\\"34': 0,
        '{"a1": 123': 3,
        '["\\\\", 12': 2,
        "[12, ": 0,
    }
    assert {text: num_digits(text) for text in expected} == expected
    assert num_digits("1", "77") == 3
    assert num_digits('{"a', '": ', "77") == 2
    assert num_digits('["a', '\\"', "77") == 0


def next_tokens(schema: object, text: str) -> set[str]:
    """The tokens that a worker's matcher allows after a text, some of it generated before."""
    matchers = Matchers(1, len(TOKENS), lambda: VOCABULARY)
    grammar = llguidance.LLMatcher.grammar_from_json_schema(
        json.dumps(schema), overrides={"whitespace_flexible": False}
    )
    before, after = ids_of(text[:3]), ids_of(text[3:])
    zero = np.zeros(1, np.int32)
    matchers.enter(
        entering(
            [0],
            SlotGrammar(
                text=grammar,
                slots=zero,
                num_generated=np.array([len(before)], np.int32),
                generated_ids=np.array(before, np.int32),
            ),
        )
    )
    for token_id in after:
        masks = matchers.masks(zero)
        assert masks is not None
        matchers.advance(masks, zero, Download(torch.tensor([token_id])))
    masks = matchers.masks(zero)
    assert masks is not None
    bits = np.unpackbits(masks.bits[0], bitorder="little")
    return {TOKENS[i] for i in np.flatnonzero(bits).tolist()}


def test_a_number_ends_after_its_digits():
    digits = {*string.digits, "77"}
    many = "1" * MAX_DIGITS
    for schema, text, end in (
        ({"type": "number"}, f"0.{many}", {"e", "E", "<end>"}),
        ({"type": "number"}, many, {".", "e", "E", "<end>"}),
        ({"type": "number", "minimum": 0, "maximum": 2}, f"1.{many}", {"<end>"}),
        ({"type": "number"}, "6.62607015e-341", {"<end>"}),
        ({"type": "array"}, f"[-{many}", {".", "e", "E", ",", "]"}),
        ({"type": "integer", "minimum": 5}, many, {"<end>"}),
    ):
        assert next_tokens(schema, text) == end, (schema, text)
        assert next_tokens(schema, text[:-1]) == end | digits, (schema, text)
    assert digits <= next_tokens({"type": "string"}, f'"{many}{many}')


def test_a_number_that_must_be_longer_goes_on():
    longest = {"type": "string", "pattern": "^[0-9]{30}$"}
    assert next_tokens(longest, '"' + "1" * 25) >= {"1"}
    tiny = {"type": "number", "minimum": 1e-25, "maximum": 2e-25}
    assert next_tokens(tiny, "0." + "0" * 22) == {"0"}
    assert next_tokens(tiny, "0." + "0" * 24 + "1") == {"<end>"}
