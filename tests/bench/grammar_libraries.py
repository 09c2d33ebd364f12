"""Compares two grammar libraries on the same schemas and vocabularies, for docs/decisions/0008.

    PYTHONPATH=tests python tests/bench/grammar_libraries.py llguidance demo
    PYTHONPATH=tests python tests/bench/grammar_libraries.py xgrammar 128000

Not part of the test suite, since xgrammar is not a dependency. ``demo`` is the vocabulary of the
bundled model; a number is the size of a vocabulary that is made of random merges.

Every schema of ``json_schemas`` is compiled and walked at random three times. A walk that may end
after 40 tokens must be valid JSON for its schema. Then come documents that a schema allows, and
documents that it does not allow.
"""

from __future__ import annotations

import importlib
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jsonschema
import numpy as np
import tokenizers
from json_schemas import SCHEMAS
from transformers import PreTrainedTokenizerFast

from tokasaurus.demo import MODEL_DIR
from tokasaurus.model.facts import model_facts
from tokasaurus.text.tokenizer import Tokenizer

_MIN_TOKENS, _MAX_TOKENS, _WALKS = 40, 120, 3
_INTEGER = {"type": "integer"}

# A schema, a document that it allows, and one that it does not allow.
DOCUMENTS: list[tuple[dict[str, Any], str, str]] = [
    (
        {"type": "object", "properties": {"a": _INTEGER}, "required": ["a"]},
        '{"a": 1}',
        '{"a": "1"}',
    ),
    ({"enum": ["red", "green"]}, '"green"', '"blue"'),
    ({"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"}, '"AB123"', '"AB12"'),
    ({"type": "integer", "minimum": 3, "maximum": 17}, "12", "18"),
    ({"type": "array", "items": _INTEGER, "minItems": 2, "maxItems": 3}, "[1, 2]", "[1]"),
    ({"type": "string", "format": "date"}, '"2024-02-28"', '"2024-13-28"'),
    ({"type": "number", "multipleOf": 5}, "25", "26"),
    ({"type": "string", "minLength": 3, "maxLength": 4}, '"abcd"', '"ab"'),
    ({"anyOf": [{"type": "null"}, {"type": "boolean"}]}, "true", "1"),
    ({"type": "array", "items": _INTEGER, "uniqueItems": True}, "[1, 2]", "[1, 1]"),
    ({"not": {"type": "string"}}, "1", '"a"'),
    (
        {
            "type": "object",
            "propertyNames": {"pattern": "^x"},
            "additionalProperties": _INTEGER,
        },
        '{"xa": 1}',
        '{"ya": 1}',
    ),
    (
        {
            "allOf": [
                {"type": "object", "properties": {name: _INTEGER}, "required": [name]}
                for name in "ab"
            ]
        },
        '{"a": 1, "b": 2}',
        '{"a": 1}',
    ),
    (
        {"oneOf": [{"type": "integer", "multipleOf": number} for number in (3, 5)]},
        "9",
        "15",
    ),
]


@dataclass(frozen=True)
class Matcher:
    """A text that is being generated, with either library."""

    mask: Callable[[], np.ndarray]  # [vocabulary] bool
    take: Callable[[int], object]


def main(library: str, vocabulary: str) -> None:
    tokenizer, size, eos = _tokenizer(vocabulary)
    importlib.import_module(library)  # so that its time is not part of what is measured
    started = time.perf_counter()
    compile_ = {"llguidance": _llguidance, "xgrammar": _xgrammar}[library](tokenizer, size, eos)
    print(f"{library}, {size} tokens: made in {time.perf_counter() - started:.2f} s")
    _walk_all(compile_, tokenizer, eos)
    for schema, good, wrong in DOCUMENTS:
        name = json.dumps(schema)[:70]
        try:
            admits = [_admits(compile_(schema), tokenizer, text, eos) for text in (good, wrong)]
        except Exception as error:  # whatever a library raises
            print(f"  refuses {name}: {str(error).strip().splitlines()[0][:70]}")
            continue
        if admits != [True, False]:
            print(f"  WRONG   {name}: valid admitted {admits[0]}, invalid {admits[1]}")


def _walk_all(
    compile_: Callable[[dict[str, Any]], Matcher], tokenizer: Tokenizer, eos: int
) -> None:
    compiling: list[float] = []
    masking: list[float] = []
    invalid: list[int] = []
    chance = random.Random(0)
    for number, schema in enumerate(SCHEMAS):
        compile_(schema)  # the server checks it first
        for _ in range(_WALKS):
            started = time.perf_counter()
            matcher = compile_(schema)
            compiling.append(time.perf_counter() - started)
            text = _walk(matcher, tokenizer, eos, chance, masking)
            if text is None:
                continue
            try:
                jsonschema.validate(json.loads(text), schema)
            except (ValueError, jsonschema.ValidationError):
                invalid.append(number)
    for what, seconds in (("compile", compiling), ("mask", masking)):
        micros = [1e6 * each for each in seconds]
        print(
            f"{what}: median {statistics.median(micros):,.0f} us,"
            f" 99% {np.percentile(micros, 99):,.0f} us, most {max(micros):,.0f} us"
        )
    print(f"ended texts that do not validate: {len(invalid)}, of schemas {sorted(set(invalid))}")


def _walk(
    matcher: Matcher, tokenizer: Tokenizer, eos: int, chance: random.Random, seconds: list[float]
) -> str | None:
    """A text that may end; None if it gets too long."""
    ids: list[int] = []
    while len(ids) < _MAX_TOKENS:
        started = time.perf_counter()
        allowed = matcher.mask()
        seconds.append(time.perf_counter() - started)
        others = np.flatnonzero(allowed)
        others = others[others != eos]
        if allowed[eos] and (len(ids) > _MIN_TOKENS or not len(others)):
            return b"".join(tokenizer.spelled[i] for i in ids).decode(errors="replace")
        if not len(others):
            return None
        # Short tokens lead to an end sooner.
        some = chance.choices(others.tolist(), k=30)
        ids.append(min(some, key=lambda i: len(tokenizer.spelled[i])) if len(ids) > 10 else some[0])
        matcher.take(ids[-1])
    return None


def _admits(matcher: Matcher, tokenizer: Tokenizer, text: str, eos: int) -> bool:
    for token in tokenizer.encode_fragment(text):
        if not matcher.mask()[token]:
            return False
        matcher.take(token)
    return bool(matcher.mask()[eos])


def _llguidance(tokenizer: Tokenizer, size: int, eos: int) -> Callable[[dict[str, Any]], Matcher]:
    from tokasaurus.text.structured_output import Grammars

    grammars = Grammars(lambda: tokenizer.vocabulary((eos,)))
    compiler = grammars.compiler()

    def compile_(schema: dict[str, Any]) -> Matcher:
        matcher = compiler.compile(grammars.text({"json": schema}))
        return Matcher(lambda: _bools(matcher.compute_bitmask(), size), matcher.consume_token)

    return compile_


def _xgrammar(tokenizer: Tokenizer, size: int, eos: int) -> Callable[[dict[str, Any]], Matcher]:
    import xgrammar

    info = xgrammar.TokenizerInfo(
        list(tokenizer.vocabulary((eos,)).tokens),
        vocab_type=xgrammar.VocabType.RAW,
        vocab_size=size,
        stop_token_ids=[eos],
    )
    compiler = xgrammar.GrammarCompiler(info, max_threads=2, cache_enabled=False)

    def compile_(schema: dict[str, Any]) -> Matcher:
        matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(json.dumps(schema)))
        bits = xgrammar.allocate_token_bitmask(1, size)

        def mask() -> np.ndarray:
            bits.fill_(-1)
            matcher.fill_next_token_bitmask(bits)
            return _bools(bits.numpy().tobytes(), size)

        return Matcher(mask, matcher.accept_token)

    return compile_


def _bools(bits: bytes, size: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[:size].astype(bool)


def _tokenizer(vocabulary: str) -> tuple[Tokenizer, int, int]:
    """A tokenizer, the size of its vocabulary, and its end-of-sequence id."""
    if vocabulary == "demo":
        facts = model_facts(MODEL_DIR)
        wrapped = PreTrainedTokenizerFast.from_pretrained(MODEL_DIR)
        size, eos = facts.vocab_size, facts.eos_token_ids[0]
    else:
        size = int(vocabulary)
        eos = size - 1
        wrapped = PreTrainedTokenizerFast(tokenizer_object=_random_bpe(size), eos_token="<|end|>")
    return Tokenizer(wrapped, size, (eos,)), size, eos


def _random_bpe(size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE whose merges are random pairs of tokens, early tokens more often."""
    chance = random.Random(0)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    ids = {character: i for i, character in enumerate(alphabet)}
    tokens = [character for character in alphabet if character.isascii() and character.isalpha()]
    tokens.append("Ġ")
    merges = []
    while len(ids) < size - 1:
        pair = chance.choice(tokens[:6000]), chance.choice(tokens[:3000])
        token = "".join(pair)
        if token not in ids and len(token) <= 14 and "Ġ" not in token[1:]:
            ids[token] = len(ids)
            merges.append(pair)
            tokens.append(token)
    ids["<|end|>"] = len(ids)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=merges))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(["<|end|>"])
    return bpe


if __name__ == "__main__":
    main(*sys.argv[1:3])
