"""Sums that are too large to know, and a calculator among the tools that works them out.

The assistant answers a sum with a call, and the tool's result with a sentence::

    user: What is 4821 + 377?      assistant: a call, {"expression": "4821 + 377"}
    tool: 5198                     assistant: 4821 + 377 = 5198.

A calculator takes an expression, or is one of several functions of two numbers. Its name and those
of its parameters vary, so that they must be read in the tools. Other questions are answered as
without tools.

The same pairs of operands are held out as in ``arithmetic``, and some names of calculators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import Any

from tokasaurus.demo.corpus import arithmetic
from tokasaurus.demo.corpus.document import (
    Call,
    Chat,
    Document,
    Message,
    Tool,
    Turns,
    chance,
    is_held_out,
    roughen,
    weighted,
)
from tokasaurus.demo.corpus.tool_table import (
    ERRORS,
    EXPRESSION_DESCRIPTIONS,
    EXPRESSION_NAMES,
    EXPRESSION_PARAMETERS,
    OPERATIONS,
    OTHER_TOOLS,
    PAIRS_OF_PARAMETERS,
    REQUESTS,
    SYSTEM_PROMPTS,
)
from tokasaurus.demo.corpus.words import invent_word

FAILED = "The calculator could not work that out."
"""The answer where the tool's message is an error."""


@dataclass(frozen=True)
class Sum:
    """A question, and what to give a calculator.

    Attributes:
        question: in words.
        numbers: the operands, as they are written.
        operators: between them: + - * /
    """

    question: str
    numbers: tuple[str, ...]
    operators: str

    @property
    def expression(self) -> str:
        pairs = zip(self.operators, self.numbers[1:], strict=True)
        return self.numbers[0] + "".join(f" {operator} {number}" for operator, number in pairs)

    @property
    def result(self) -> str:
        return written(evaluate(self.expression))


def evaluate(expression: str) -> Fraction:
    """The value of numbers between + - * and /, without brackets. Raises ValueError."""
    total, product = Fraction(0), Fraction(0)
    tokens = expression.split()
    for operator, token in zip(["+", *tokens[1::2]], tokens[::2], strict=True):
        number = Fraction(token)
        if operator in "+-":
            total, product = total + product, number if operator == "+" else -number
        elif operator == "*":
            product *= number
        elif operator == "/":
            product /= number
        else:
            raise ValueError(f"unknown operator: {operator}")
    return total + product


def written(number: Fraction) -> str:
    """A whole number without a point, any other with at most four decimals."""
    if number.denominator == 1:
        return str(number.numerator)
    return f"{float(number):.4f}".rstrip("0").rstrip(".")


# --- the sum --------------------------------------------------------------------------------------


def _number(rng: Random, most_digits: int = 7) -> int:
    digits = rng.choices(range(1, most_digits + 1), (8, 22, 30, 20, 10, 6, 4)[:most_digits])[0]
    return rng.randrange(10 ** (digits - 1), 10**digits)


def _operands(rng: Random, operator: str) -> tuple[str, str]:
    if operator == "*":
        return str(_number(rng, 5)), str(_number(rng, 4))
    if operator == "/":
        b = max(2, _number(rng, 3))
        return str(b * _number(rng, 4) if chance(rng, 0.8) else _number(rng, 5)), str(b)
    if chance(rng, 0.06):
        decimals = rng.randint(1, 2)
        return f"{_number(rng, 4)}.{rng.randrange(1, 10**decimals)}", str(_number(rng, 3))
    return str(_number(rng)), str(_number(rng))


def _pair(rng: Random, operator: str, held_out: bool, *, positive: bool) -> tuple[str, str]:
    while True:
        a, b = _operands(rng, operator)
        if positive and operator == "-" and Fraction(a) <= Fraction(b):
            continue
        if pair_is_held_out(a, operator, b) == held_out:
            return a, b


def pair_is_held_out(a: str, operator: str, b: str) -> bool:
    """As in ``arithmetic``, where ``x`` stands for ``*``."""
    low, high = sorted((a, b), key=Fraction)
    return is_held_out(f"{low} {'x' if operator == '*' else operator} {high}")


def _worded(rng: Random, held_out: bool) -> Sum:
    operator = weighted(rng, [(5, "+"), (4, "-"), (3, "*")])
    while True:
        a, b = _pair(rng, operator, held_out, positive=True)
        if a.isdigit() and b.isdigit():
            break
    wordings = arithmetic.WORDED["x" if operator == "*" else operator]
    return Sum(rng.choice(wordings).format(a=a, b=b, **arithmetic.cast(rng)), (a, b), operator)


def _bare(rng: Random, held_out: bool) -> Sum:
    operator = weighted(rng, [(5, "+"), (4, "-"), (5, "*"), (3, "/")])
    a, b = _pair(rng, operator, held_out, positive=chance(rng, 0.9))
    sign = rng.choice(OPERATIONS[operator].signs)
    question = rng.choice(REQUESTS).format(sum=_joined(rng, [a, b], [sign]))
    return Sum(question, (a, b), operator)


def _ordered(rng: Random, held_out: bool) -> Sum:
    """An order to do one operation, which may name the operands the other way round."""
    operator = weighted(rng, [(5, "+"), (4, "-"), (5, "*"), (3, "/")])
    a, b = _pair(rng, operator, held_out, positive=chance(rng, 0.9))
    return Sum(rng.choice(OPERATIONS[operator].orders).format(a=a, b=b), (a, b), operator)


def _chain(rng: Random, held_out: bool) -> Sum:
    """Three numbers, of which both pairs of neighbours are held out or neither is."""
    operators = rng.choice(("++", "++", "+-", "-+", "*+", "*-", "+*", "**"))
    while True:
        numbers = [str(_number(rng, 4)) for _ in range(3)]
        pairs = zip(numbers, operators, numbers[1:], strict=False)
        if {pair_is_held_out(*pair) for pair in pairs} == {held_out}:
            break
    signs = [rng.choice(OPERATIONS[operator].signs) for operator in operators]
    question = rng.choice(REQUESTS).format(sum=_joined(rng, numbers, signs))
    return Sum(question, tuple(numbers), operators)


def _joined(rng: Random, numbers: list[str], signs: list[str]) -> str:
    """Signs have spaces around them, or not if they are no words."""
    space = "" if chance(rng, 0.3) and not any(map(str.isalpha, signs)) else " "
    pairs = zip(signs, numbers[1:], strict=True)
    return numbers[0] + "".join(space + sign + space + number for sign, number in pairs)


def large_sum(rng: Random, *, held_out: bool = False, chains: bool = True) -> Sum:
    """A sum to give a calculator."""
    make = weighted(rng, [(35, _worded), (40, _bare), (17, _ordered), (8 if chains else 0, _chain)])
    return make(rng, held_out)


# --- the tools ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calculator:
    """Tools that work sums out, and how to call them."""

    tools: tuple[Tool, ...]
    call: Callable[[Sum], Call]
    takes_chains: bool


def function(
    rng: Random, name: str, description: str, parameters: dict[str, dict[str, Any]]
) -> Tool:
    """A tool as one of several libraries would describe it."""
    schema: dict[str, Any] = {"type": "object", "properties": parameters}
    if parameters or chance(rng, 0.5):
        schema["required"] = list(parameters)
    if chance(rng, 0.25):
        schema["additionalProperties"] = False
    if chance(rng, 0.3):
        for parameter, values in parameters.items():
            values["title"] = parameter.replace("_", " ").title()
        if chance(rng, 0.5):
            schema["title"] = name + "_args"
        if chance(rng, 0.5):
            schema = {key: schema[key] for key in sorted(schema)}
    tool = {"name": name, "parameters": schema}
    if description:
        tool = {"name": name, "description": description, "parameters": schema}
    return tool


def expression_calculator(rng: Random, name: str, parameter: str) -> Calculator:
    """A tool that takes an expression."""
    values: dict[str, Any] = {"type": "string"}
    if chance(rng, 0.3):
        values["description"] = rng.choice(
            ("The expression.", "The sum to work out.", "An expression such as 2 + 2.")
        )
    description = rng.choice(EXPRESSION_DESCRIPTIONS) if chance(rng, 0.9) else ""
    tool = function(rng, name, description, {parameter: values})
    return Calculator((tool,), lambda asked: Call(name, {parameter: asked.expression}), True)


def pair_calculator(rng: Random, suffix: str, parameters: tuple[str, str]) -> Calculator:
    """Four tools that each take two numbers."""
    number = rng.choice(("integer", "number"))
    names = {operator: each.name + suffix for operator, each in OPERATIONS.items()}
    operators = list(OPERATIONS)
    rng.shuffle(operators)
    tools = tuple(
        function(
            rng,
            names[operator],
            rng.choice(OPERATIONS[operator].descriptions) if chance(rng, 0.8) else "",
            {parameter: {"type": number} for parameter in parameters},
        )
        for operator in operators
    )

    def call(asked: Sum) -> Call:
        numbers = (float(n) if "." in n else int(n) for n in asked.numbers)
        return Call(names[asked.operators], dict(zip(parameters, numbers, strict=True)))

    return Calculator(tools, call, False)


def _any_calculator(rng: Random, share_of_pairs: float) -> Calculator:
    if chance(rng, 1 - share_of_pairs):
        name = "calculator" if chance(rng, 0.3) else rng.choice(EXPRESSION_NAMES)
        parameter = "expression" if chance(rng, 0.4) else rng.choice(EXPRESSION_PARAMETERS)
        if chance(rng, 0.15):
            name = invent_word(rng)
        if chance(rng, 0.15):
            parameter = invent_word(rng)
        return expression_calculator(rng, name, parameter)
    suffix = rng.choice(("", "", "", "_numbers", "_two", "_" + invent_word(rng)))
    return pair_calculator(rng, suffix, rng.choice(PAIRS_OF_PARAMETERS))


def other_tools(rng: Random, count: int) -> list[Tool]:
    """Tools that are no calculators."""
    return [
        function(rng, name, description, {p: {"type": kind} for p, kind in parameters})
        for name, description, parameters in rng.sample(OTHER_TOOLS, count)
    ]


# --- conversations --------------------------------------------------------------------------------


def said_by_tool(rng: Random, asked: Sum) -> str:
    """The tool's message: the number, or a text that has it."""
    result = asked.result
    forms = [
        (70, result),
        (10, f'{{"result": {result}}}'),
        (5, f"{asked.expression} = {result}"),
        (5, f"The result is {result}."),
        (5, f"Result: {result}"),
        (5, result if "." in result else f"{result}.0"),
    ]
    return weighted(rng, forms)


def answer(asked: Sum, result: str) -> str:
    return f"{asked.expression} = {result}."


def sum_turns(rng: Random, calculator: Calculator) -> Turns:
    """A sum, the call, what the tool says, and the answer."""
    asked = large_sum(rng, chains=calculator.takes_chains)
    while not calculator.takes_chains and "." in asked.expression:
        asked = large_sum(rng, chains=False)
    question = roughen(rng, asked.question)
    call = calculator.call(asked)
    if chance(rng, 0.1):
        hint = rng.choice(("Use the {} tool.", "Use {}.", "Call {}.", "Please use the {}."))
        question = f"{question} {hint.format(call.name)}"
    turns = [Message("user", question), Message("assistant", "", (call,))]
    if chance(rng, 0.02):
        return [*turns, Message("tool", rng.choice(ERRORS)), Message("assistant", FAILED)]
    said = said_by_tool(rng, asked)
    result = asked.result + (".0" if said == f"{asked.result}.0" else "")
    return [*turns, Message("tool", said), Message("assistant", answer(asked, result))]


TurnsMaker = Callable[[Random], Turns]


def chat(rng: Random, room: int, other_turns: TurnsMaker, share_of_pairs: float = 0.25) -> Document:
    """Sums with a calculator at hand, some among other things.

    Args:
        rng: the source of random numbers.
        room: tokens of the block.
        other_turns: makes exchanges that need no tool.
        share_of_pairs: of the calculators, those that are functions of two numbers.
    """
    calculator = _any_calculator(rng, share_of_pairs)
    tools = list(calculator.tools)
    if len(tools) == 1:
        tools += other_tools(rng, rng.choices((0, 1, 2), (65, 25, 10))[0])
    elif chance(rng, 0.5):
        tools = tools[: rng.randint(1, 3)]
    rng.shuffle(tools)
    names = {tool["name"] for tool in tools}
    turns: Turns = []
    fits_one = room <= 256 or (room <= 512 and len(tools) > 2)
    for _ in range(1 if fits_one else rng.choices((1, 2, 3), (35, 40, 25))[0]):
        if chance(rng, 0.2):
            turns += other_turns(rng)
            continue
        while True:
            new = sum_turns(rng, calculator)
            if new[1].calls[0].name in names:
                break
        turns += new
    return Chat((*_opening(rng), *turns), tuple(tools))


def toolless_chat(rng: Random, _room: int, other_turns: TurnsMaker) -> Document:
    """Tools that are no calculators, and questions that need none of them."""
    turns = [turn for _ in range(rng.randint(1, 3)) for turn in other_turns(rng)]
    return Chat((*_opening(rng), *turns), tuple(other_tools(rng, rng.randint(1, 2))))


def _opening(rng: Random) -> Turns:
    if chance(rng, 0.5):
        return []
    return [Message("system", rng.choice(SYSTEM_PROMPTS))]
