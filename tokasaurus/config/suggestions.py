"""What to say about a key that is not the name of a flag.

Owns the search for the name that was meant. Knows no flags of its own, and no other program's.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["Foreign", "explain_unknown", "nearest"]

_LIKE = 0.66  # of two names, from 0 to 1
_LIKE_WORD = 0.6  # of two of their words
_LIKE_LETTERS = 0.85  # of names whose words differ, such as pagesize and page_size
_NUM_MENTIONS = 3  # flags that are worth reading about
_SHORTEST_WORD = 4  # letters of a word that is looked for in helps, and of a name that is guessed


@dataclass(frozen=True)
class Foreign:
    """Another program's flag: our flag for the same purpose, or None, and the difference."""

    ours: str | None
    note: str = ""


def nearest(key: str, names: Iterable[str]) -> str | None:
    """The name that has the key's words, or words spelled like them; None if there is none.

    Half of the words must agree: a guess by the letters alone finds ``ssl_certfile`` for
    ``launcher``, and sends the user in the wrong direction.
    """
    likeness, name = max(((_likeness(key, name), name) for name in names), default=(0.0, ""))
    return name if likeness >= _LIKE else None


def explain_unknown(key: str, helps: Mapping[str, str], foreign: Mapping[str, Foreign]) -> str:
    """One line with the key and what to write instead.

    Args:
        key: as written.
        helps: what each flag does, by each of its names.
        foreign: other programs' flags by name.
    """
    plain = key.lower().replace("-", "_")
    for name in (plain, plain.removeprefix("no_")):
        if name in foreign:
            return f"unknown flag {key!r}: {_instead(foreign[name])}"
    near = nearest(plain, helps)
    long = [name for name in foreign if len(name) >= _SHORTEST_WORD]
    theirs = nearest(plain, long) if near is None else None
    if near is not None:
        return f"unknown flag {key!r}: the nearest is {near!r}; --help lists all flags"
    if theirs is not None:
        return f"unknown flag {key!r}: if it means {theirs!r}, {_instead(foreign[theirs])}"
    mentions = _mentions(plain, helps)
    if mentions:
        return f"unknown flag {key!r}; in --help, see {', '.join(mentions)}"
    return f"unknown flag {key!r}; --help lists all flags"


def _instead(other: Foreign) -> str:
    if other.ours is None:
        return other.note
    note = f" ({other.note})" if other.note else ""
    return f"the flag for this is {other.ours!r}{note}"


def _likeness(key: str, name: str) -> float:
    """How alike two names are: the share of their words that are alike, counted by likeness."""
    words, others = key.split("_"), name.split("_")
    alike = sum(max(_ratio(word, other, _LIKE_WORD) for other in others) for word in words)
    letters = _ratio(key.replace("_", ""), name.replace("_", ""), _LIKE_LETTERS)
    return max(2 * alike / (len(words) + len(others)), letters)


def _ratio(one: str, other: str, least: float) -> float:
    """How alike two texts are; 0 if it is less than ``least``."""
    ratio = difflib.SequenceMatcher(None, one, other, autojunk=False).ratio()
    return ratio if ratio >= least else 0.0


def _mentions(key: str, helps: Mapping[str, str]) -> list[str]:
    """The flags whose help has every word of a key, unless they are many."""
    words = [word for word in key.split("_") if len(word) >= _SHORTEST_WORD]
    patterns = [re.compile(rf"\b{re.escape(word)}", re.IGNORECASE) for word in words]
    found = [
        name
        for name, text in helps.items()
        if patterns and all(pattern.search(f"{name} {text}") for pattern in patterns)
    ]
    return found if len(found) <= _NUM_MENTIONS else []
