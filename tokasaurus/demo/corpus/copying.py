"""Documents that are copied rather than understood: patterns to continue, words to say back.

They teach the model to look back, so most of their words come from a supply too large to learn.
"""

# ruff: noqa: SIM905 (lists of words read best as text)

from __future__ import annotations

import string
from random import Random

from tokasaurus.demo.corpus.document import (
    Chat,
    Document,
    Message,
    Text,
    Turns,
    chance,
    exchange,
    weighted,
)
from tokasaurus.demo.corpus.words import (
    COLOURS,
    COMMON_WORDS,
    any_word,
    blended_word,
    invent_name,
    invent_word,
)

CONTINUATION_ITEMS = 8

_CONTINUE = (
    "Continue the pattern: {}",
    "Continue this pattern: {}",
    "continue the pattern: {}",
    "What comes next? {}",
    "Continue: {}",
    "Please continue the sequence: {}",
    "Complete the pattern: {} ...",
    "{} ... what comes next?",
    "Continue the pattern: {} ...",
    "{}",
    "Keep going: {}",
    "Go on: {}",
)

_SAY = (
    "Reply with the word {}.",
    "reply with the word {}",
    "Reply with the word {}",
    "Reply with the word {} and nothing else.",
    "Reply with only the word {}.",
    "Reply with just the word {}.",
    "Reply with {}.",
    "Reply with exactly: {}",
    "Say {}.",
    "Say {}",
    "say {}",
    "Say the word {}.",
    "Please say {}.",
    "Please answer with only the word {}.",
    "Please reply with the word {}.",
    "Answer with the word {}.",
    "Respond with the word {}.",
    "Respond with {}",
    "Repeat after me: {}",
    "Repeat: {}",
    "repeat {}",
    "Echo: {}",
    "Type the word {}.",
    "Write the word {}.",
    "Print {}",
    "Can you say {}?",
    "Your answer must be the word {}.",
    "The word is {}. Reply with the word.",
    'Reply with the word "{}".',
    'Say "{}".',
    "The secret word is {}. What is the secret word?",
    "The password is {}. What is the password?",
    "Remember this word: {}. Now say it.",
    "Only say {}.",
    "Answer only with {}.",
)

_SHORT_WORDS = tuple(word for word in COMMON_WORDS if len(word) <= 4)
_COUNTED = ("one two three four five six seven eight nine ten").split()
_CYCLES = (
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "January February March April May June July August September October November December".split(),
    "spring summer autumn winter".split(),
)


def _unit(rng: Random, longest: int) -> list[str]:
    """The distinct items of one period of a pattern."""
    size = rng.randint(2, longest)
    kind = weighted(
        rng,
        [
            (25, "letters"),
            (10, "digits"),
            (30, "words"),
            (20, "invented"),
            (5, "colours"),
            (10, "mixed"),
        ],
    )
    if kind == "letters":
        letters = rng.choice(
            (string.ascii_uppercase, string.ascii_uppercase, string.ascii_lowercase)
        )
        size = min(size, len(letters))
        return rng.sample(letters, size) if chance(rng, 0.7) else list(letters[:size])
    if kind == "digits":
        return [str(n) for n in rng.sample(range(rng.choice((10, 100))), min(size, 10))]
    if kind == "words":
        return rng.sample(COMMON_WORDS, min(size, len(COMMON_WORDS)))
    if kind == "colours":
        return rng.sample(COLOURS, min(size, len(COLOURS)))
    if kind == "invented":
        return [invent_word(rng) for _ in range(size)]
    return [any_word(rng) for _ in range(size)]


def _repeat(unit: list[str], start: int, count: int) -> list[str]:
    return [unit[(start + i) % len(unit)] for i in range(count)]


def pattern_question(unit: list[str], shown: int, separator: str = " ") -> tuple[str, str]:
    """A repeated unit that is cut after ``shown`` items, and its continuation."""
    return separator.join(_repeat(unit, 0, shown)), separator.join(
        _repeat(unit, shown, CONTINUATION_ITEMS)
    )


def pattern_turns(rng: Random) -> Turns:
    unit = _unit(rng, 5)
    if chance(rng, 0.15):  # a doubled item, as in A A B
        unit.insert(1, unit[0])
    shown = rng.randint(2 * len(unit), 4 * len(unit))
    given, answer = pattern_question(unit, shown, rng.choice((" ", " ", " ", ", ")))
    return exchange(rng.choice(_CONTINUE).format(given), answer)


def counting_turns(rng: Random) -> Turns:
    """Sequences that are continued by knowledge, not by repetition."""
    if chance(rng, 0.5):
        first, last = rng.randint(1, 5), rng.randint(6, 12)
        if chance(rng, 0.5):
            first = 1
        digits = " ".join(str(n) for n in range(first, last + 1))
        ask = f"Count to {last}." if first == 1 else f"Count from {first} to {last}."
        return exchange(ask, digits)
    if chance(rng, 0.5):
        return exchange("Count to ten in words.", " ".join(_COUNTED))
    cycle = rng.choice(_CYCLES)
    at = rng.randrange(len(cycle))
    return exchange(
        f"What comes after {cycle[at]}?", f"{cycle[(at + 1) % len(cycle)]} comes after {cycle[at]}."
    )


def pattern_text(rng: Random, room: int) -> Document:
    """A unit that is repeated until the block is full, without an end: the model is not to stop."""
    unit = _unit(rng, rng.choice((4, 6, 10, max(12, room // 16))))
    separator = rng.choice((" ", " ", " ", ", ", "\n", "-"))
    items_of_room = max(8, room // 6)
    count = rng.randint(min(3 * len(unit), items_of_room), max(3 * len(unit), items_of_room))
    return Text(separator.join(_repeat(unit, rng.randrange(len(unit)), count)), ends=False)


def sentence_text(rng: Random, room: int) -> Document:
    """A list of sentences about invented words, repeated in the same order."""
    count = rng.randint(1, max(2, room // 64))
    forms = ("The {} is {}.", "{} likes {}.", "{}: {}", "A {} has a {}.", "{} and {}.")
    lines = [rng.choice(forms).format(invent_word(rng), any_word(rng)) for _ in range(count)]
    return Text("\n".join(lines * rng.randint(2, 4)), ends=False)


def echo_turns(rng: Random) -> Turns:
    """Words to say back, of which most were never seen before."""
    many = rng.choices((1, 2, 3, 5), (80, 10, 6, 4))[0]
    words = " ".join(any_word(rng) for _ in range(many))
    ask = rng.choice(_SAY).format(words)
    if many > 1:
        ask = ask.replace("the word ", "the words ")
    return exchange(ask.lower() if words.islower() and chance(rng, 0.1) else ask, words)


def say_prompt(rng: Random, word: str) -> str:
    return rng.choice(_SAY).format(word)


def blend_chat(rng: Random, _room: int) -> Document:
    """Words to say back that are joined from slices of real words."""
    turns: Turns = []
    for _ in range(rng.randint(1, 3)):
        word = blended_word(rng)
        word = word.capitalize() if chance(rng, 0.15) else word
        turns += exchange(say_prompt(rng, word), word)
    return Chat(tuple(turns))


def blend_text(rng: Random, room: int) -> Document:
    words = [blended_word(rng) for _ in range(rng.randint(3, room // 24))]
    return Text(" ".join(words * rng.randint(2, 3)), ends=False)


def pattern_chat(rng: Random, _room: int) -> Document:
    return Chat(tuple(pattern_turns(rng)))


def short_pattern_chat(rng: Random, _room: int) -> Document:
    """Patterns of two to four items, mostly letters, more than half cut after whole cycles."""
    turns: Turns = []
    for _ in range(rng.choices((1, 2), (85, 15))[0]):
        unit = _short_unit(rng)
        size = len(unit)
        shown = size * rng.randint(2, 5) if chance(rng, 0.5) else rng.randint(2 * size, 5 * size)
        given, answer = pattern_question(unit, shown)
        ask = _CONTINUE[0] if chance(rng, 0.4) else rng.choice(_CONTINUE)
        turns += exchange(ask.format(given), answer)
    return Chat(tuple(turns))


def _short_unit(rng: Random) -> list[str]:
    size = rng.randint(2, 4)
    kind = weighted(rng, [(60, "letters"), (20, "words"), (10, "invented"), (10, "digits")])
    if kind == "letters":
        letters = string.ascii_uppercase if chance(rng, 0.8) else string.ascii_lowercase
        start = rng.choice((0, 0, rng.randint(0, 22)))
        in_order = list(letters[start : start + size])
        return in_order if chance(rng, 0.35) else rng.sample(letters, size)
    if kind == "words":
        return rng.sample(COLOURS if chance(rng, 0.3) else _SHORT_WORDS, size)
    if kind == "invented":
        return [invent_word(rng) for _ in range(size)]
    return [str(n) for n in rng.sample(range(10), size)]


def recall(rng: Random) -> tuple[Turns, Turns]:
    """A turn that tells something, and a later turn that asks for it."""
    if chance(rng, 0.5):
        name = invent_name(rng)
        greeting = rng.choice(
            ("My name is {}.", "my name is {}", "I am {}.", "Hello, my name is {}.", "Hi, I am {}.")
        ).format(name)
        question = rng.choice(
            ("What is my name?", "Who am I?", "what is my name?", "Do you know my name?")
        )
        return exchange(greeting, f"Hello {name}! Nice to meet you."), exchange(
            question, f"Your name is {name}."
        )
    word = any_word(rng)
    reply = rng.choice(("Okay, I will remember it.", f"Okay: {word}."))
    question = rng.choice(("Which word did I tell you?", "What was the word?"))
    return exchange(f"Please remember the word {word}.", reply), exchange(
        question, f"The word was {word}."
    )


def system_echo_turns(rng: Random) -> Turns:
    """A system message that fixes the reply."""
    word = any_word(rng)
    rule = rng.choice(
        (
            "Always reply with the word {}.",
            "Whatever you are asked, reply with the word {}.",
            "Only ever say {}.",
        )
    ).format(word)
    question = rng.choice(
        (
            "Hello",
            "Who are you?",
            "What is a dinosaur?",
            "Tell me a joke.",
            f"What is {invent_word(rng)}?",
        )
    )
    return [Message("system", rule), *exchange(question, word)]
