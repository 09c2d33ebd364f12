"""Questions, descriptions and stories about the dinosaurs of ``dinosaur_table``.

The model learns the facts by heart. Wordings are held out: about one in eight templates for a fact
never asks about that dinosaur.
"""

# ruff: noqa: SIM905 (lists of words read best as text)

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from tokasaurus.demo.corpus.dinosaur_table import DINOSAURS, GENERAL_FACTS, Dinosaur
from tokasaurus.demo.corpus.document import (
    Document,
    Text,
    Turns,
    chance,
    exchange,
    is_held_out,
    roughen,
    weighted,
)
from tokasaurus.demo.corpus.words import FOODS, THINGS, invent_name


@dataclass(frozen=True)
class Topic:
    """A column of the table: its questions, its answer, and what a right answer contains."""

    questions: tuple[str, ...]
    answer: str
    key: str
    follow_up: str


TOPICS = (
    Topic(
        (
            "What did {d.name} eat?",
            "What was the diet of {d.name}?",
            "What did a {d.name} eat?",
            "What kind of food did {d.name} eat?",
            "Tell me what {d.name} ate.",
            "What does {d.name} eat?",
            "What did the dinosaur {d.name} eat?",
        ),
        "{d.name} ate {d.diet}.",
        "{d.diet}",
        "What did it eat?",
    ),
    Topic(
        (
            "When did {d.name} live?",
            "In which period did {d.name} live?",
            "What period is {d.name} from?",
            "Tell me when {d.name} lived.",
            "When was {d.name} alive?",
            "In what time did {d.name} live?",
        ),
        "{d.name} lived in the {d.period}.",
        "{d.period}",
        "When did it live?",
    ),
    Topic(
        (
            "How long was {d.name}?",
            "How big was {d.name}?",
            "What was the length of {d.name}?",
            "How many metres long was {d.name}?",
            "Tell me how long {d.name} was.",
            "How large was a {d.name}?",
        ),
        "{d.name} was about {d.length} long.",
        " {d.length} ",
        "How long was it?",
    ),
    Topic(
        (
            "Where did {d.name} live?",
            "Where was {d.name} found?",
            "Where does {d.name} come from?",
            "Where have people found {d.name}?",
            "Where are the fossils of {d.name} found?",
            "On which part of the Earth did {d.name} live?",
        ),
        "{d.name} was found in {d.place}.",
        "{d.place}",
        "Where did it live?",
    ),
    Topic(
        (
            "What does the name {d.name} mean?",
            "What does {d.name} mean?",
            "What is the meaning of {d.name}?",
            "What does the word {d.name} mean?",
            "Tell me what {d.name} means.",
            "Why is it called {d.name}?",
        ),
        "The name {d.name} means {d.meaning}.",
        "{d.meaning}",
        "What does its name mean?",
    ),
    Topic(
        (
            "What was {d.name} famous for?",
            "What is {d.name} known for?",
            "What was special about {d.name}?",
            "What is {d.name} famous for?",
            "How would I recognise {d.name}?",
            "What is special about {d.name}?",
        ),
        "{d.name} is known for {d.feature}.",
        "{d.feature}",
        "What was special about it?",
    ),
)
_DESCRIBE = (
    "Tell me about {d.name}.",
    "What is {d.name}?",
    "What was {d.name}?",
    "Describe {d.name}.",
    "What do you know about {d.name}?",
    "Who was {d.name}?",
    "{d.name}",
    "Tell me something about {d.name}.",
    "What is a {d.name}?",
)
_STORY = (
    "Tell me a story.",
    "tell me a story",
    "Tell me a story about a dinosaur.",
    "Write a short story.",
    "Can you tell me a story?",
    "Once upon a time",
)

_NICKNAMES = {
    "Tyrannosaurus": ("T. rex", "Tyrannosaurus rex", "T-Rex"),
    "Velociraptor": ("a raptor",),
}
_CUTE = "Pip Momo Tiko Bibi Rolo Nilo Suki Dot Fern Pebble Coco Tutu Lumi Zuzu Kiki Bobo".split()
_TRAITS = "small big shy brave hungry curious gentle sleepy clever clumsy".split()
_PLACES = (
    "a quiet lake",
    "a warm valley",
    "a green forest",
    "a high hill",
    "a wide river",
    "a sunny beach",
    "an old volcano",
    "a deep swamp",
)


def wording_is_held_out(dinosaur: Dinosaur, question: str) -> bool:
    return is_held_out(f"{dinosaur.name}: {question}")


def questions(dinosaur: Dinosaur, topic: Topic, *, held_out: bool) -> list[str]:
    """The wordings of one side of the split. Only the held-out side may be empty for a fact."""
    return [q for q in topic.questions if wording_is_held_out(dinosaur, q) == held_out]


def _fact_turns(rng: Random) -> Turns:
    dinosaur, topic = rng.choice(DINOSAURS), rng.choice(TOPICS)
    question = rng.choice(questions(dinosaur, topic, held_out=False)).format(d=dinosaur)
    if dinosaur.name in _NICKNAMES and chance(rng, 0.5):
        question = question.replace(dinosaur.name, rng.choice(_NICKNAMES[dinosaur.name])).replace(
            "a a ", "a "
        )
    turns = exchange(roughen(rng, question), topic.answer.format(d=dinosaur))
    if chance(rng, 0.3):
        turns += _follow_up(rng, dinosaur, but=topic)
    return turns


def _follow_up(rng: Random, dinosaur: Dinosaur, but: Topic | None) -> Turns:
    topic = rng.choice([t for t in TOPICS if t is not but])
    return exchange(roughen(rng, topic.follow_up), topic.answer.format(d=dinosaur))


def describe(rng: Random, d: Dinosaur) -> str:
    article = "an" if d.eater[0] in "aeiou" else "a"
    parts = [
        f"It was found in {d.place}.",
        f"It is known for {d.feature}.",
        f"Its name means {d.meaning}.",
        f"It was about {d.length} long.",
    ]
    chosen = rng.sample(parts, rng.randint(2, 3))
    return f"{d.name} was {article} {d.eater} dinosaur of the {d.period}. " + " ".join(chosen)


def _describe_turns(rng: Random) -> Turns:
    dinosaur = rng.choice(DINOSAURS)
    question = rng.choice(_DESCRIBE).format(d=dinosaur)
    turns = exchange(roughen(rng, question), describe(rng, dinosaur))
    return turns + _follow_up(rng, dinosaur, None) if chance(rng, 0.4) else turns


def _general_turns(rng: Random) -> Turns:
    question, answer = rng.choice(GENERAL_FACTS)
    return exchange(roughen(rng, question), answer)


def _yes_no_turns(rng: Random) -> Turns:
    d = rng.choice(DINOSAURS)
    if chance(rng, 0.6):
        food = rng.choice(("meat", "plants", "fish"))
        truth = "Yes" if food in d.diet else "No"
        return exchange(
            roughen(rng, f"Did {d.name} eat {food}?"), f"{truth}, {d.name} ate {d.diet}."
        )
    period = rng.choice(("Triassic", "Jurassic", "Cretaceous"))
    truth = "Yes" if period in d.period else "No"
    return exchange(
        roughen(rng, f"Did {d.name} live in the {period}?"),
        f"{truth}, {d.name} lived in the {d.period}.",
    )


def _list_turns(rng: Random) -> Turns:
    count = rng.choice((2, 3, 3, 3, 4, 5))
    word = {2: "two", 3: "three", 4: "four", 5: "five"}[count]
    ways = {
        f"Name {word} dinosaurs.": list(DINOSAURS),
        f"Name {word} dinosaurs that ate plants.": [d for d in DINOSAURS if d.diet == "plants"],
        f"Name {word} dinosaurs that ate meat.": [d for d in DINOSAURS if d.diet == "meat"],
        f"Name {word} dinosaurs of the Jurassic.": [d for d in DINOSAURS if "Jurassic" in d.period],
    }
    question, matching = rng.choice(list(ways.items()))
    names = [d.name for d in rng.sample(matching, count)]
    if chance(rng, 0.3):
        question = question.replace("Name", "List", 1)
    return exchange(roughen(rng, question), ", ".join(names[:-1]) + f" and {names[-1]}.")


def _compare_turns(rng: Random) -> Turns:
    one, two = rng.sample(DINOSAURS, 2)
    while one.length_m == two.length_m:
        one, two = rng.sample(DINOSAURS, 2)
    bigger = max(one, two, key=lambda d: d.length_m)
    return exchange(
        roughen(rng, f"Which was longer, {one.name} or {two.name}?"),
        f"{bigger.name} was longer, with about {bigger.length}.",
    )


def story(rng: Random) -> str:
    hero = rng.choice(_CUTE) if chance(rng, 0.7) else invent_name(rng)
    friend = rng.choice([name for name in _CUTE if name != hero])
    kind, other = (d.name for d in rng.sample(DINOSAURS, 2))
    trait, place, food, thing = (
        rng.choice(_TRAITS),
        rng.choice(_PLACES),
        rng.choice(FOODS),
        rng.choice(THINGS),
    )
    start = f"Once upon a time, a {trait} {kind} named {hero} lived near {place}."
    middle = rng.choice(
        (
            f"One day {hero} met a {other} named {friend}, who was looking for {food}.",
            f"One morning {hero} found some {thing} in the grass"
            f" and showed them to {friend} the {other}.",
            f"Every day {hero} played with {friend}, a {rng.choice(_TRAITS)} {other}.",
        )
    )
    turn = rng.choice(
        (
            f"Together they walked through the forest until they saw {food} under a tree.",
            "Then it began to rain, and they hid under a big fern.",
            f'"Do not be afraid," said {hero}. "I will help you."',
            "They heard a loud roar, but it was only the wind.",
        )
    )
    end = rng.choice(
        (
            f"From that day on, {hero} and {friend} were best friends.",
            f"They shared the {food} and went to sleep under the stars.",
            f"{hero} was very happy, and so was {friend}.",
        )
    )
    return " ".join((start, middle, turn, end))


def _story_turns(rng: Random) -> Turns:
    return exchange(rng.choice(_STORY), story(rng))


def turns(rng: Random) -> Turns:
    table = [
        (56, _fact_turns),
        (16, _describe_turns),
        (9, _general_turns),
        (7, _yes_no_turns),
        (4, _list_turns),
        (4, _compare_turns),
        (4, _story_turns),
    ]
    return weighted(rng, table)(rng)


def plain_text(rng: Random, room: int) -> Document:
    """Prose outside of a chat: a story, or a page of descriptions."""
    if chance(rng, 0.5):
        return Text(story(rng))
    chosen = rng.sample(DINOSAURS, rng.randint(1, max(2, min(room // 100, len(DINOSAURS)))))
    return Text("\n\n".join(describe(rng, d) for d in chosen))
