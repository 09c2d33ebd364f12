"""Small word problems, each answered by a line of sums and ``Answer: 12``.

In the first course a sum is stated outright (``14 + 9 = 23.``). In the second it is worked out: the
units first, then the whole (``4 + 9 = 13. 14 + 9 = 23.``).

Pairs of operands are held out: no training document shows a pair for which ``pair_is_held_out``
holds, in either order, whether the sum is worded, bare or worked out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from tokasaurus.demo.corpus.document import (
    Document,
    Text,
    Turns,
    capitalised,
    chance,
    exchange,
    is_held_out,
    roughen,
    weighted,
)
from tokasaurus.demo.corpus.words import FOODS, PEOPLE, THINGS, invent_name

_MORE = (
    "{who} has {a} {what}. {who} finds {b} more. How many {what} does {who} have now?",
    "{who} has {a} {what}. {other} gives {who} {b} more. How many {what} does {who} have?",
    "{who} has {a} {what} and {other} has {b} {what}. How many {what} do they have together?",
    "There are {a} {what} in a box. {who} puts in {b} more. How many {what} are in the box?",
    "{who} found {a} {what} on Monday and {b} {what} on Tuesday."
    " How many {what} did {who} find in all?",
    "A dinosaur ate {a} {what} in the morning and {b} in the evening. How many {what} did it eat?",
    "{who} buys {a} {what} and {b} {more}. How many things does {who} buy?",
    "There are {a} dinosaurs by the lake. Then {b} more come. How many dinosaurs are there now?",
)
_LESS = (
    "{who} has {a} {what}. {who} gives {b} to {other}. How many {what} does {who} have left?",
    "{who} has {a} {what} and loses {b} of them. How many {what} are left?",
    "There are {a} {what} in a box. {who} takes {b} of them. How many {what} are still in the box?",
    "{who} had {a} {what}. {who} ate {b}. How many {what} are left?",
    "There are {a} dinosaurs by the lake. Then {b} walk away. How many dinosaurs are left?",
    "{who} has {a} {what} and {other} has {b}. How many more {what} does {who} have than {other}?",
)
_TIMES = (
    "{who} has {a} boxes with {b} {what} in each box. How many {what} does {who} have?",
    "There are {a} nests with {b} eggs in each nest. How many eggs are there?",
    "{who} buys {a} bags. Each bag has {b} {what}. How many {what} does {who} buy?",
)
_BARE = (
    "What is {a} {op} {b}?",
    "{a} {op} {b} = ?",
    "{a} {op} {b}",
    "Calculate {a} {op} {b}.",
    "How much is {a} {op} {b}?",
)
_SPOKEN = {"+": ("plus",), "-": ("minus",), "x": ("times",)}
WORDED = {"+": _MORE, "-": _LESS, "x": _TIMES}
_THEN_MORE = (" Then {who} finds {c} more.", " Then {other} gives {who} {c} more.")
_THEN_LESS = (
    " Then {who} gives away {c}.",
    " Then {who} loses {c}.",
    " Then {who} eats {c} of them.",
)


Sum = tuple[int, str, int]


@dataclass(frozen=True)
class Problem:
    question: str
    sums: tuple[Sum, ...]
    kind: str

    @property
    def answer(self) -> int:
        return compute(*self.sums[-1])

    @property
    def solution(self) -> str:
        """The solution of the first course: each sum outright."""
        return _line(self.sums) + f"\nAnswer: {self.answer}"

    @property
    def worked_sums(self) -> list[Sum]:
        return [step for one in self.sums for step in _worked(*one)]

    @property
    def worked_solution(self) -> str:
        return _line(self.worked_sums) + f"\nAnswer: {self.answer}"


def pair_is_held_out(a: int, op: str, b: int) -> bool:
    low, high = sorted((a, b))
    return is_held_out(f"{low} {op} {high}")


def compute(a: int, op: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "x": a * b}[op]


def _pair(rng: Random, op: str, held_out: bool, most: int = 20) -> tuple[int, int]:
    while True:
        if op == "x":
            a, b = rng.randint(2, 6), rng.randint(2, 9)
        else:
            a, b = rng.randint(1, most), rng.randint(1, most)
        if op == "-" and b >= a:
            continue
        if pair_is_held_out(a, op, b) == held_out:
            return a, b


def _worked(a: int, op: str, b: int) -> list[Sum]:
    """The sums that work a sum out: the units, with a borrowed ten if needed, then the whole."""
    first, second = a % 10, b % 10
    if op == "-" and first < second:
        first += 10
    is_plain = op == "x" or (first, second) == (a, b)
    return [(a, op, b)] if is_plain else [(first, op, second), (a, op, b)]


def cast(rng: Random) -> dict[str, str]:
    who, other = rng.sample(PEOPLE, 2)
    if chance(rng, 0.2):
        who = invent_name(rng)
    what, more = rng.choice(THINGS), rng.choice(FOODS)
    return {"who": who, "other": other, "what": what, "more": more}


def _line(sums: Iterable[Sum]) -> str:
    return " ".join(f"{a} {op} {b} = {compute(a, op, b)}." for a, op, b in sums)


def _one_step(rng: Random, held_out: bool) -> Problem:
    op = weighted(rng, [(5, "+"), (4, "-"), (1, "x")])
    a, b = _pair(rng, op, held_out)
    question = rng.choice(WORDED[op]).format(a=a, b=b, **cast(rng))
    return Problem(question, ((a, op, b),), op)


def _bare(rng: Random, held_out: bool) -> Problem:
    op = weighted(rng, [(5, "+"), (4, "-"), (1, "x")])
    a, b = _pair(rng, op, held_out)
    question = rng.choice(_BARE).format(a=a, b=b, op=rng.choice((op, *_SPOKEN[op])))
    return Problem(question, ((a, op, b),), f"bare {op}")


def _two_steps(rng: Random, held_out: bool) -> Problem:
    """Two sums, whose pairs are both held out or both not."""
    while True:
        first, second = rng.choice("+-"), rng.choice("+-")
        a, b = _pair(rng, first, held_out)
        between, c = compute(a, first, b), rng.randint(1, 12)
        if pair_is_held_out(between, second, c) == held_out and compute(between, second, c) > 0:
            break
    names = cast(rng)
    opening = (
        (" {who} finds {b} more.", " {other} gives {who} {b} more.")
        if first == "+"
        else (" {who} gives {other} {b}.", " {who} loses {b}.")
    )
    parts = (
        "{who} has {a} {what}."
        + rng.choice(opening)
        + rng.choice(_THEN_MORE if second == "+" else _THEN_LESS)
    )
    question = (parts + " How many {what} does {who} have now?").format(a=a, b=b, c=c, **names)
    return Problem(question, ((a, first, b), (between, second, c)), "two steps")


def problem(rng: Random, *, held_out: bool = False) -> Problem:
    make = weighted(rng, [(60, _one_step), (20, _two_steps), (20, _bare)])
    return make(rng, held_out)


def turns(rng: Random) -> Turns:
    item = problem(rng)
    return _exchange(rng, item, item.solution)


def _exchange(rng: Random, item: Problem, solution: str) -> Turns:
    hint = rng.choice(("", "", "", "", " Think step by step.", " End with the answer."))
    return exchange(roughen(rng, item.question) + hint, solution)


def plain_text(rng: Random, _room: int) -> Document:
    """Problems outside of a chat."""
    items = [problem(rng) for _ in range(rng.randint(1, 3))]
    return Text(
        "\n\n".join(capitalised(f"question: {item.question}\n{item.solution}") for item in items)
    )


# --- the second course ----------------------------------------------------------------------------


def worked_problem(rng: Random) -> Problem:
    while True:
        item = problem(rng)
        if not any(pair_is_held_out(*step) for step in item.worked_sums):
            return item


def worked_turns(rng: Random) -> Turns:
    item = worked_problem(rng)
    return _exchange(rng, item, item.worked_solution)


def drill(rng: Random, _room: int) -> Document:
    """A page of bare sums, which has something to work out every few tokens."""
    sums: list[Sum] = []
    for _ in range(rng.randint(6, 14)):
        op = weighted(rng, [(10, "+"), (8, "-"), (1, "x")])
        a, b = _pair(rng, op, held_out=False, most=rng.choice((9, 20, 20, 40)))
        steps = _worked(a, op, b)
        if not any(pair_is_held_out(*step) for step in steps):
            sums += steps
    return Text(_line(sums))
