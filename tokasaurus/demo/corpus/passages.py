"""Short passages of invented facts, and questions that only the passage can answer.

Every subject is invented. The evaluation draws subjects and invented values from the other side of
the split (``held_out=True``), so that the model cannot remember an answer.
"""

# ruff: noqa: SIM905 (lists of words read best as text)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tokasaurus.demo.corpus.document import (
    Chat,
    Document,
    Message,
    Text,
    Turns,
    chance,
    exchange,
    roughen,
)
from tokasaurus.demo.corpus.words import ANIMALS, COLOURS, FOODS, THINGS, invent_name

Value = Callable[[Random, bool], str]


def _one_of(words: list[str]) -> Value:
    return lambda rng, _: rng.choice(words)


def _name(rng: Random, held_out: bool) -> str:
    return invent_name(rng, held_out=held_out)


def _number(low: int, high: int) -> Value:
    return lambda rng, _: str(rng.randint(low, high))


_COLOUR, _FOOD, _ANIMAL, _THING = (
    _one_of(COLOURS),
    _one_of(FOODS),
    _one_of(ANIMALS),
    _one_of(THINGS),
)
_JOB = _one_of(
    """baker farmer teacher doctor painter sailor singer tailor miller hunter gardener potter smith
    cook""".split()
)
_MATERIAL = _one_of("wood stone glass iron gold silver paper clay copper ice sand steel".split())
_WEATHER = _one_of("cold hot windy rainy snowy foggy dry stormy".split())
_SPOT = _one_of("bed table chair oven carpet stairs bridge tree rock lamp".split())


@dataclass(frozen=True)
class Relation:
    """A kind of fact. In each template, ``{s}`` is the subject and ``{v}`` the value."""

    value: Value
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Kind:
    opening: str
    relations: tuple[Relation, ...]


@dataclass(frozen=True)
class Fact:
    subject: str
    relation: Relation
    value: str

    def fill(self, template: str) -> str:
        return template.format(s=self.subject, v=self.value)


KINDS = (
    Kind(
        "{s} is a person.",
        (
            Relation(
                _JOB,
                ("{s} works as a {v}.", "{s} is a {v}."),
                ("What is the job of {s}?", "What does {s} do?", "What does {s} work as?"),
                "{s} is a {v}.",
            ),
            Relation(
                _FOOD,
                ("{s} likes to eat {v}.", "{s} loves {v}.", "The favourite food of {s} is {v}."),
                ("What does {s} like to eat?", "What is the favourite food of {s}?"),
                "{s} likes to eat {v}.",
            ),
            Relation(
                _COLOUR,
                ("The favourite colour of {s} is {v}.", "{s} likes the colour {v} best."),
                ("What is the favourite colour of {s}?", "Which colour does {s} like?"),
                "The favourite colour of {s} is {v}.",
            ),
            Relation(
                _name,
                ("{s} lives in {v}.", "The home of {s} is in {v}."),
                ("Where does {s} live?", "In which town does {s} live?"),
                "{s} lives in {v}.",
            ),
            Relation(
                _ANIMAL,
                ("{s} has a pet {v}.", "{s} owns a {v}."),
                ("Which pet does {s} have?", "What animal does {s} have?"),
                "{s} has a {v}.",
            ),
            Relation(
                _number(3, 99),
                ("{s} is {v} years old.",),
                ("How old is {s}?", "What is the age of {s}?"),
                "{s} is {v} years old.",
            ),
            Relation(
                _name,
                ("The best friend of {s} is {v}.", "{s} has a friend called {v}."),
                ("Who is the friend of {s}?", "Who is the best friend of {s}?"),
                "The friend of {s} is {v}.",
            ),
        ),
    ),
    Kind(
        "{s} is a village.",
        (
            Relation(
                _name,
                ("The mayor of {s} is {v}.", "{s} has a mayor called {v}."),
                ("Who is the mayor of {s}?", "What is the name of the mayor of {s}?"),
                "The mayor of {s} is {v}.",
            ),
            Relation(
                _number(20, 9999),
                ("{v} people live in {s}.", "{s} has {v} people."),
                ("How many people live in {s}?",),
                "{v} people live in {s}.",
            ),
            Relation(
                _THING,
                ("{s} is famous for its {v}.", "People know {s} for its {v}."),
                ("What is {s} famous for?", "What is {s} known for?"),
                "{s} is famous for its {v}.",
            ),
            Relation(
                _name,
                ("{s} lies on the river {v}.", "The river of {s} is called {v}."),
                ("Which river is {s} on?", "What is the river of {s} called?"),
                "{s} is on the river {v}.",
            ),
            Relation(
                _WEATHER,
                ("The weather in {s} is {v}.", "It is always {v} in {s}."),
                ("What is the weather like in {s}?", "How is the weather in {s}?"),
                "The weather in {s} is {v}.",
            ),
            Relation(
                _COLOUR,
                ("The houses of {s} are {v}.", "Every house in {s} is {v}."),
                ("What colour are the houses of {s}?",),
                "The houses of {s} are {v}.",
            ),
        ),
    ),
    Kind(
        "{s} is a planet.",
        (
            Relation(
                _number(2, 60),
                ("{s} has {v} moons.", "There are {v} moons around {s}."),
                ("How many moons does {s} have?",),
                "{s} has {v} moons.",
            ),
            Relation(
                _COLOUR,
                ("The sky of {s} is {v}.", "{s} has a {v} sky."),
                ("What colour is the sky of {s}?", "What is the colour of the sky on {s}?"),
                "The sky of {s} is {v}.",
            ),
            Relation(
                _MATERIAL,
                ("{s} is made of {v}.", "The ground of {s} is made of {v}."),
                ("What is {s} made of?",),
                "{s} is made of {v}.",
            ),
            Relation(
                _name,
                ("The capital of {s} is {v}.", "{s} has a capital called {v}."),
                ("What is the capital of {s}?",),
                "The capital of {s} is {v}.",
            ),
            Relation(
                _name,
                ("The king of {s} is {v}.", "{v} is the king of {s}."),
                ("Who is the king of {s}?", "What is the name of the king of {s}?"),
                "The king of {s} is {v}.",
            ),
        ),
    ),
    Kind(
        "{s} is a dinosaur.",
        (
            Relation(
                _FOOD,
                ("{s} eats {v}.", "{s} only eats {v}."),
                ("What does {s} eat?", "What is the food of {s}?"),
                "{s} eats {v}.",
            ),
            Relation(
                _number(2, 60),
                ("{s} is {v} metres long.",),
                ("How long is {s}?",),
                "{s} is {v} metres long.",
            ),
            Relation(
                _COLOUR,
                ("{s} is {v}.", "The skin of {s} is {v}.", "{s} has {v} skin."),
                ("What colour is {s}?", "Which colour is {s}?"),
                "{s} is {v}.",
            ),
            Relation(
                _name,
                ("{s} was found by {v}.", "{v} discovered {s}."),
                ("Who found {s}?", "Who discovered {s}?"),
                "{s} was found by {v}.",
            ),
            Relation(
                _name,
                ("{s} lives in {v}.", "{s} comes from {v}."),
                ("Where does {s} live?", "Where does {s} come from?"),
                "{s} lives in {v}.",
            ),
            Relation(
                _THING,
                ("{s} collects {v}.", "{s} hides {v} in its nest."),
                ("What does {s} collect?", "What does {s} hide in its nest?"),
                "{s} collects {v}.",
            ),
        ),
    ),
    Kind(
        "{s} is a robot.",
        (
            Relation(
                _name,
                ("{s} was built by {v}.", "{v} built {s}."),
                ("Who built {s}?", "Who made {s}?"),
                "{s} was built by {v}.",
            ),
            Relation(
                _MATERIAL,
                ("{s} is made of {v}.", "The body of {s} is {v}."),
                ("What is {s} made of?",),
                "{s} is made of {v}.",
            ),
            Relation(
                _JOB,
                ("{s} works as a {v}.", "{s} is used as a {v}."),
                ("What does {s} work as?", "What is the job of {s}?"),
                "{s} works as a {v}.",
            ),
            Relation(
                _number(2, 999),
                ("The code of {s} is {v}.", "{s} has the code {v}."),
                ("What is the code of {s}?", "Which code does {s} have?"),
                "The code of {s} is {v}.",
            ),
            Relation(
                _ANIMAL,
                ("{s} looks like a {v}.", "{s} has the shape of a {v}."),
                ("What does {s} look like?",),
                "{s} looks like a {v}.",
            ),
        ),
    ),
    Kind(
        "{s} is a ship.",
        (
            Relation(
                _name,
                ("The captain of {s} is {v}.", "{v} is the captain of {s}."),
                ("Who is the captain of {s}?", "What is the name of the captain of {s}?"),
                "The captain of {s} is {v}.",
            ),
            Relation(
                _THING,
                ("{s} carries {v}.", "{s} is full of {v}."),
                ("What does {s} carry?", "What is {s} full of?"),
                "{s} carries {v}.",
            ),
            Relation(
                _COLOUR,
                ("The sails of {s} are {v}.", "{s} has {v} sails."),
                ("What colour are the sails of {s}?",),
                "The sails of {s} are {v}.",
            ),
            Relation(
                _name,
                ("{s} sails to {v}.", "{s} is on its way to {v}."),
                ("Where does {s} sail to?", "Where is {s} going?"),
                "{s} sails to {v}.",
            ),
            Relation(
                _SPOT,
                ("The key of {s} is under the {v}.", "The map of {s} is under the {v}."),
                ("Where is the key of {s}?", "Where is the map of {s}?"),
                "It is under the {v}.",
            ),
        ),
    ),
)

_FRAMES = (
    "{p}\n\n{q}",
    "{p} {q}",
    "{p}\n{q}",
    "Passage: {p}\nQuestion: {q}",
    "Passage: {p}\n\nQuestion: {q}",
    "Read the passage and answer the question.\n\n{p}\n\n{q}",
    "Context: {p}\n\nQuestion: {q}",
    "Here is a text: {p} {q}",
    "Text: {p}\n\nAnswer this question: {q}",
)
_OF_ANSWERS = (" Answer with one word.", " Answer in one word.", " One word only.")


@dataclass(frozen=True)
class Passage:
    text: str
    facts: tuple[Fact, ...]


def _facts(rng: Random, kind: Kind, subject: str, count: int, held_out: bool) -> list[Fact]:
    relations = rng.sample(kind.relations, min(count, len(kind.relations)))
    return [Fact(subject, relation, relation.value(rng, held_out)) for relation in relations]


def passage(rng: Random, *, num_subjects: int, num_facts: int, held_out: bool = False) -> Passage:
    """Invents subjects with up to ``num_facts`` facts each, and tells the facts in some order."""
    kind = rng.choice(KINDS)
    groups: list[list[str]] = []
    facts: list[Fact] = []
    for _ in range(num_subjects):
        subject = invent_name(rng, held_out=held_out)
        own = _facts(rng, kind, subject, num_facts, held_out)
        sentences = [fact.fill(rng.choice(fact.relation.statements)) for fact in own]
        if chance(rng, 0.5):
            sentences.insert(0, kind.opening.format(s=subject))
        groups.append(sentences)
        facts += own
        kind = rng.choice(KINDS) if chance(rng, 0.3) else kind
    told = [sentence for group in groups for sentence in group]
    if chance(rng, 0.3):
        rng.shuffle(told)
    return Passage(" ".join(told), tuple(facts))


def _sized_passage(rng: Random, room: int) -> Passage:
    most = 3 if room <= 256 else room // 64
    return passage(rng, num_subjects=rng.randint(1, most), num_facts=rng.randint(1, 4))


def ask(rng: Random, fact: Fact, *, one_word: bool = False) -> tuple[str, str]:
    question = fact.fill(rng.choice(fact.relation.questions))
    if one_word:
        return question + rng.choice(_OF_ANSWERS), fact.value
    return question, fact.fill(fact.relation.answer)


def frame(rng: Random, text: str, question: str) -> str:
    return rng.choice(_FRAMES).format(p=text, q=question)


def chat(rng: Random, room: int) -> Document:
    """One to four questions about a passage in the first message or in the system message."""
    item = _sized_passage(rng, room)
    asked = rng.sample(item.facts, min(len(item.facts), rng.randint(1, 4)))
    in_system = chance(rng, 0.12)
    messages: Turns = [Message("system", item.text)] if in_system else []
    for i, fact in enumerate(asked):
        question, answer = ask(rng, fact, one_word=chance(rng, 0.15))
        if chance(rng, 0.1):
            question = roughen(rng, question) if not chance(rng, 0.5) else question.rstrip("?")
        if i == 0 and not in_system:
            question = frame(rng, item.text, question)
        messages += exchange(question, answer)
    return Chat(tuple(messages))


def recall(rng: Random) -> tuple[Turns, Turns]:
    """A passage with a first question, and a second question that is asked much later."""
    item = passage(rng, num_subjects=1, num_facts=rng.randint(2, 4))
    now, later = rng.sample(item.facts, 2)
    question, answer = ask(rng, now)
    return exchange(frame(rng, item.text, question), answer), exchange(*ask(rng, later))


def plain_text(rng: Random, room: int) -> Document:
    """Passage, questions and answers outside of a chat, as a completion endpoint sees them."""
    item = _sized_passage(rng, room)
    lines = ["Passage: " + item.text]
    for fact in rng.sample(item.facts, min(len(item.facts), rng.randint(1, 4))):
        question, answer = ask(rng, fact)
        lines.append(f"Question: {question}\nAnswer: {answer}")
    return Text("\n".join(lines))
