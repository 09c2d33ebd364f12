"""Conversation: jokes, small talk, questions without an answer, and chats that mix all families."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tokasaurus.demo.corpus import arithmetic, calculator, copying, dinosaurs, passages
from tokasaurus.demo.corpus.chat_table import (
    JOKE_REQUESTS,
    JOKES,
    SMALL_TALK,
    SYSTEM_PROMPTS,
    UNKNOWN_QUESTIONS,
    UNKNOWN_REPLIES,
)
from tokasaurus.demo.corpus.document import (
    Chat,
    Document,
    Message,
    Turns,
    chance,
    exchange,
    roughen,
    weighted,
)
from tokasaurus.demo.corpus.words import COMMON_WORDS, invent_word


def joke_turns(rng: Random) -> Turns:
    return exchange(roughen(rng, rng.choice(JOKE_REQUESTS)), rng.choice(JOKES))


def small_talk_turns(rng: Random) -> Turns:
    asked, replies = rng.choice(SMALL_TALK)
    return exchange(roughen(rng, rng.choice(asked)), rng.choice(replies))


def unknown_turns(rng: Random) -> Turns:
    topics = [rng.choice(COMMON_WORDS) if chance(rng, 0.4) else invent_word(rng) for _ in range(2)]
    topics = [topic.capitalize() if chance(rng, 0.4) else topic for topic in topics]
    return exchange(
        roughen(rng, rng.choice(UNKNOWN_QUESTIONS).format(*topics)), rng.choice(UNKNOWN_REPLIES)
    )


Makers = list[tuple[float, Callable[[Random], Turns]]]

_MAKERS: Makers = [
    (30, dinosaurs.turns),
    (26, arithmetic.turns),
    (18, copying.echo_turns),
    (11, copying.pattern_turns),
    (1, copying.counting_turns),
    (3, joke_turns),
    (6, small_talk_turns),
    (2, unknown_turns),
]


_MAKERS_WITH_WORKED_SUMS: Makers = [
    (weight, arithmetic.worked_turns if make is arithmetic.turns else make)
    for weight, make in _MAKERS
]


def chat(rng: Random, room: int) -> Document:
    """One exchange, or several about different things, as in real conversations."""
    return _chat(rng, room, _MAKERS)


def chat_with_worked_sums(rng: Random, room: int) -> Document:
    return _chat(rng, room, _MAKERS_WITH_WORKED_SUMS)


def _chat(rng: Random, room: int, makers: Makers) -> Document:
    most = 4 if room <= 256 else room // 40
    count = 1 if chance(rng, 0.7) else rng.randint(2, most)
    turns = [turn for _ in range(count) for turn in weighted(rng, makers)(rng)]
    if chance(rng, 0.1):
        opening, closing = rng.choice((copying.recall, passages.recall))(rng)
        turns = opening + (turns if chance(rng, 0.6) else []) + closing
    if chance(rng, 0.1):
        turns.insert(0, Message("system", rng.choice(SYSTEM_PROMPTS)))
    return Chat(tuple(turns))


def ruled_chat(rng: Random, _room: int) -> Document:
    return Chat(tuple(copying.system_echo_turns(rng)))


def calculator_chat(rng: Random, room: int) -> Document:
    """Sums with a calculator at hand, some among small talk."""
    return calculator.chat(rng, room, _turns_without_sums)


def expression_chat(rng: Random, room: int) -> Document:
    """The same, and the calculator always takes an expression."""
    return calculator.chat(rng, room, _turns_without_sums, share_of_pairs=0)


def toolless_chat(rng: Random, room: int) -> Document:
    """Tools are at hand, and none of them helps."""
    return calculator.toolless_chat(rng, room, _any_turns)


def _turns_without_sums(rng: Random) -> Turns:
    makers = [(weight, make) for weight, make in _MAKERS if make is not arithmetic.turns]
    return weighted(rng, makers)(rng)


def _any_turns(rng: Random) -> Turns:
    return weighted(rng, _MAKERS_WITH_WORKED_SUMS)(rng)
