"""Finds stop strings in a text that grows token by token, and never releases a part of one.

All stop strings of a request make one Aho-Corasick automaton, which its samples share. The state is
the longest end of the text that a stop string begins with, which is exactly what must be held back.
One character costs the same for one stop string and for a hundred, however long they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

__all__ = ["Automaton", "StopStrings"]

Symbol: TypeAlias = str | int
"""A character, or the id of a special token, which stands for no character of the text."""


class Automaton:
    """Searches for several patterns at once.

    Args:
        patterns: at least one, none of them empty.

    Attributes:
        held: for each state, the characters at the text's end that may begin a pattern.
        found: for each state, the characters of the longest pattern that ends there; -1 if no
            pattern ends there.
    """

    def __init__(self, patterns: Iterable[Sequence[Symbol]]) -> None:
        self._next: list[dict[Symbol, int]] = [{}]
        self._fallback = [0]
        self.held = [0]
        self.found = [-1]
        for pattern in patterns:
            self._add(pattern)
        self._link()
        self.first_symbols = frozenset(self._next[0])

    def _add(self, pattern: Sequence[Symbol]) -> None:
        state = 0
        for symbol in pattern:
            following = self._next[state].get(symbol)
            if following is None:
                following = len(self._next)
                self._next[state][symbol] = following
                self._next.append({})
                self._fallback.append(0)
                self.held.append(self.held[state] + isinstance(symbol, str))
                self.found.append(-1)
            state = following
        self.found[state] = self.held[state]

    def _link(self) -> None:
        """Breadth first. A state falls back to its longest proper end that is a state too."""
        queue = list(self._next[0].values())
        for state in queue:
            for symbol, child in self._next[state].items():
                self._fallback[child] = self.step(self._fallback[state], symbol)
                if self.found[child] < 0:
                    self.found[child] = self.found[self._fallback[child]]
                queue.append(child)

    def step(self, state: int, symbol: Symbol) -> int:
        """The state after one more symbol."""
        while True:
            following = self._next[state].get(symbol)
            if following is not None:
                return following
            if state == 0:
                return 0
            state = self._fallback[state]


@dataclass(frozen=True)
class StopStrings:
    """The stop strings of a request, ready to be searched for.

    Attributes:
        in_text: finds stop strings in the text.
        across_special: finds stop strings that hold the name of a special token among other
            characters, in the text with its special tokens; None if there are none.
        token_ids: special tokens with a stop string for a name; drawing one ends a sequence.
    """

    in_text: Automaton
    across_special: Automaton | None
    token_ids: tuple[int, ...]

    @staticmethod
    def compile(stop: tuple[str, ...], special_ids: Mapping[str, int]) -> StopStrings | None:
        """Compiles stop strings; None if there are none. Equal arguments are compiled once."""
        return _compile(stop, tuple(special_ids.items())) if stop else None


@lru_cache(maxsize=64)
def _compile(stop: tuple[str, ...], special: tuple[tuple[str, int], ...]) -> StopStrings:
    special_ids = dict(special)
    names = "|".join(re.escape(name) for name in sorted(special_ids, key=len, reverse=True))
    across: list[list[Symbol]] = []
    for string in stop:
        pieces = re.split(f"({names})", string) if names else [string]
        if string not in special_ids and len(pieces) > 1:
            symbols: list[Symbol] = []
            for piece in pieces:
                symbols.extend([special_ids[piece]] if piece in special_ids else piece)
            across.append(symbols)
    return StopStrings(
        in_text=Automaton(stop),
        across_special=Automaton(across) if across else None,
        token_ids=tuple(special_ids[string] for string in stop if string in special_ids),
    )
