"""The text of one sample while it grows: detokenizes as ids come, and ends at a stop string.

The joined pieces are the text that decoding all ids at once would give, cut before the first stop
string. That holds however the ids were split into updates, and wherever a character or a stop
string lies across tokens. The first stop string is the one that is complete after the fewest
tokens; if one token completes several, it is the one that begins first.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from tokasaurus.text.stop_strings import Automaton, StopStrings, Symbol
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["TextStream"]

_NO_TOKEN = -1
_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class _Search:
    """The place of one sample in an automaton."""

    __slots__ = ("_automaton", "_state")

    def __init__(self, automaton: Automaton) -> None:
        self._automaton = automaton
        self._state = 0

    @property
    def held(self) -> int:
        """The number of characters at the text's end that may begin a stop string."""
        return self._automaton.held[self._state]

    def advance(self, symbols: Sequence[Symbol]) -> int | None:
        """Takes the characters that one token adds.

        Returns:
            The beginning of the stop string that begins first, in characters before the end of the
            text; None if no stop string was found.
        """
        automaton = self._automaton
        if self._state == 0 and automaton.first_symbols.isdisjoint(symbols):
            return None
        state, found = self._state, automaton.found
        since_start: int | None = None
        for symbol in symbols:
            state = automaton.step(state, symbol)
            if since_start is not None:
                since_start += isinstance(symbol, str)
            if found[state] >= 0 and (since_start is None or found[state] > since_start):
                since_start = found[state]
        self._state = state
        return since_start


class TextStream:
    """The text of one sample.

    Args:
        tokenizer: spells the ids.
        stops: the stop strings, if any.
        min_tokens: a stop string that is complete within this many tokens is plain text.
    """

    __slots__ = (
        "_across",
        "_decoder",
        "_in_text",
        "_min_tokens",
        "_parts",
        "_pending",
        "_special",
        "_visible",
        "num_tokens",
    )

    def __init__(
        self, tokenizer: Tokenizer, stops: StopStrings | None = None, min_tokens: int = 0
    ) -> None:
        self._min_tokens = min_tokens
        self._visible = tokenizer.visible
        self._special = tokenizer.special_token_ids
        self._decoder = _utf8_decoder(errors="replace")
        self._in_text = _Search(stops.in_text) if stops else None
        across = stops.across_special if stops else None
        self._across = _Search(across) if across else None
        self._pending = ""  # decoded, but held back
        self._parts: list[str] = []
        self.num_tokens = 0
        """Tokens taken; after a stop string, those up to the one that completed it."""

    def feed(self, token_ids: Sequence[int], *, final: bool = False) -> bool:
        """Takes the next ids.

        Args:
            token_ids: may be empty.
            final: no more will follow, so held-back text is plain text.

        Returns:
            Whether a stop string was found. The stream must not be fed again after that.
        """
        if self._in_text is None:
            visible = self._visible
            self._release(self._decoder.decode(b"".join([visible[i] for i in token_ids]), final))
            self.num_tokens += len(token_ids)
            return False
        for token_id in token_ids:
            self.num_tokens += 1
            if self._search(self._decoder.decode(self._visible[token_id]), token_id):
                return True
        if final:
            if self._search(self._decoder.decode(b"", True), _NO_TOKEN):
                return True
            self._release(self._pending)
            self._pending = ""
        return False

    def take(self) -> str:
        """The text released since the last call, or since the beginning."""
        parts, self._parts = self._parts, []
        return parts[0] if len(parts) == 1 else "".join(parts)

    @property
    def has_text(self) -> bool:
        """Whether ``take`` would give any text."""
        return bool(self._parts)

    def _search(self, piece: str, token_id: int) -> bool:
        """Adds the text of one token; releases what cannot be part of a stop string any more."""
        assert self._in_text is not None
        text = self._pending + piece
        start = self._in_text.advance(piece)
        held = self._in_text.held
        if self._across is not None:
            symbols: Sequence[Symbol] = [token_id] if token_id in self._special else piece
            other = self._across.advance(symbols)
            held = max(held, self._across.held)
            if other is not None:
                start = other if start is None else max(start, other)
        if start is not None and self.num_tokens > self._min_tokens:
            self._release(text[: len(text) - start])
            self._pending = ""
            return True
        kept = len(text) - held
        self._release(text[:kept])
        self._pending = text[kept:]
        return False

    def _release(self, text: str) -> None:
        if text:
            self._parts.append(text)
