"""Compiles grammars with llguidance for one vocabulary.

A grammar travels as text in llguidance's own syntax. The server writes the text and compiles it
once, to refuse grammars that do not compile. The worker compiles the same text to match tokens
against it. Both use this module, with the same limits, so the worker can run every grammar that the
server accepts. It knows nothing of requests or tensors.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import llguidance

from tokasaurus.errors import RequestError

__all__ = ["MAX_GRAMMAR_BYTES", "GrammarCompiler", "Vocabulary", "accepts", "holds_json"]

MAX_GRAMMAR_BYTES = 1 << 16
"""The longest text that is compiled.

The library recurses along chains of rules, and a stack overflow ends the process. Chains of some
hundred rules fill the usual 8 MB. So a thread with a larger stack compiles: several times what the
longest chain in a text of this size needs. Only the used part of a stack becomes memory.
"""
MAX_MULTIPLES = 20_000
"""The limit for the sum of a grammar's ``multipleOf``, without decimal points and trailing zeros.

The library builds an automaton with a state for each remainder. 20,000 states take a fraction of a
second; a million take half a minute, and the worker would stand still.
"""
_MAX_MASK_ITEMS = 10_000
"""The limit for one mask, in the library's measure of work. A matcher that needs more gives up.

Every sequence of a batch waits for all masks. The library's own limit is 50,000, which took up to
half a second on a busy machine; 10,000 take a tenth of a second. Schemas with sixty alternatives
need less than half of it.
"""
_MULTIPLE = re.compile(r"multipleOf\W{1,4}?\s*([0-9][0-9.eE+-]*)")
_LISTING = re.compile(r"^ +(?:\d+ \|.*|\^)$\n?", re.MULTILINE)
"""Lines of the grammar in a reason. Clients know theirs; that of enforced calls, none has seen."""
_STACK_BYTES = 512 << 20
_stack_size_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The texts of a tokenizer's ids.

    Attributes:
        tokens: the bytes of each id of the model; b"" if an id has none.
        special_token_ids: never part of a text.
        eos_token_ids: at least one; they may follow a complete text.
        encode: the model's tokens of a text. Any thread may call it.
    """

    tokens: Sequence[bytes]
    special_token_ids: frozenset[int]
    eos_token_ids: tuple[int, ...]
    encode: Callable[[str], list[int]]


class GrammarCompiler:
    """Compiles grammars for one vocabulary. Its constructor takes a second for 100,000 tokens.

    Args:
        vocabulary: the tokens to match.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_ids = vocabulary.eos_token_ids
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Tokenizer(vocabulary)),
            n_vocab=len(vocabulary.tokens),
            eos_token=list(vocabulary.eos_token_ids),
        )
        self._limits = llguidance.LLParserLimits(
            step_max_items=_MAX_MASK_ITEMS, verbose_errors=False
        )

    def compile(self, text: str) -> llguidance.LLMatcher:
        """A matcher at the beginning of a grammar. Any thread may call this.

        Raises:
            RequestError: the grammar cannot be compiled. It gives the library's reason.
        """
        if len(text.encode()) > MAX_GRAMMAR_BYTES:
            raise RequestError(
                f"it is {len(text.encode())} bytes long; at most {MAX_GRAMMAR_BYTES} are compiled"
            )
        if _sum_of_multiples(text) > MAX_MULTIPLES:
            raise RequestError(
                "multipleOf has too many digits; without decimal points and trailing zeros, "
                f"the values in a grammar may add up to {MAX_MULTIPLES}"
            )
        compiled: list[llguidance.LLMatcher] = []

        def run() -> None:
            compiled.append(
                llguidance.LLMatcher(self._tokenizer, text, log_level=0, limits=self._limits)
            )

        _run_on_large_stack(run)
        (matcher,) = compiled
        if matcher.is_error():
            raise RequestError(_LISTING.sub("", matcher.get_error()).strip())
        return matcher


def holds_json(text: str) -> bool:
    """Whether a grammar's text is a JSON schema, or has one in it."""
    return '"json_schema"' in text or "%json" in text


def accepts(schema: Any, text: str, *, whole: bool = True) -> bool:
    """Whether a text without white space matches a JSON schema; false if it does not compile.

    Takes about a millisecond. Any thread may call it.

    Args:
        schema: a JSON schema.
        text: to match.
        whole: false asks whether the text can be the beginning of a match.
    """
    overrides: Any = {"whitespace_flexible": False}
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=overrides)
    try:
        matcher = _byte_compiler().compile(grammar)
    except RequestError:
        return False
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and (matcher.is_accepting() or not whole)


@functools.cache
def _byte_compiler() -> GrammarCompiler:
    """A compiler for a vocabulary of the 256 bytes and an end."""
    tokens = [bytes([byte]) for byte in range(256)]
    return GrammarCompiler(
        Vocabulary([*tokens, b"<end>"], frozenset([256]), (256,), lambda text: list(text.encode()))
    )


class _Tokenizer:
    """A vocabulary in the shape that llguidance expects."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = vocabulary.tokens
        self.special_token_ids = sorted(vocabulary.special_token_ids)
        self.eos_token_id = vocabulary.eos_token_ids[0]
        self.bos_token_id = None
        self._encode = vocabulary.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode())


def _sum_of_multiples(text: str) -> int:
    total = 0
    for number in _MULTIPLE.findall(text):
        # The library reports malformed numbers.
        with contextlib.suppress(InvalidOperation):
            digits = Decimal(number).normalize().as_tuple().digits
            total += int("".join(map(str, digits[:9])))
    return total


def _run_on_large_stack(function: Callable[[], None]) -> None:
    with _stack_size_lock:
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread = threading.Thread(target=function, name="grammar")
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
