"""The bundled model works sums out with a calculator: tool loops of the openai client."""

from __future__ import annotations

import json

import pytest
from openai import pydantic_function_tool
from pydantic import BaseModel

from tokasaurus.demo.corpus.calculator import evaluate, pair_is_held_out, written

pytestmark = pytest.mark.engine

GREEDY = {"model": "default", "temperature": 0, "max_tokens": 200}
FUNCTION = {
    "name": "calculator",
    "description": "Evaluate an arithmetic expression.",
    "parameters": {
        "type": "object",
        "properties": {"expression": {"type": "string"}},
        "required": ["expression"],
    },
}
CALCULATOR = {"type": "function", "function": FUNCTION}
SMALL_SUM = {"role": "user", "content": "What is 3 + 4?"}

# The expression that each asks for. No training document has any of these pairs of numbers.
SUMS = {
    "What is 4823 + 381?": "4823 + 381",
    "Tom has 5210 coins. Anna gives Tom 86 more. How many coins does Tom have?": "5210 + 86",
    "Multiply 325 by 55.": "325 * 55",
    "How much is 90210 - 1236?": "90210 - 1236",
}


class Calculator(BaseModel):
    expression: str


class NumberCalculator(BaseModel):
    number: int


OF_PYDANTIC = pydantic_function_tool(Calculator, name="calculator", description="A calculator.")
OF_NUMBERS = pydantic_function_tool(
    NumberCalculator, name="calculator", description="A calculator."
)


@pytest.fixture
def client(engine):
    return engine.client(timeout=60)


def ask(client, messages, tools, *, stream=False, **fields):
    """The assistant's message, as the next request repeats it."""
    request = {**GREEDY, "messages": messages, "tools": tools, **fields}
    if stream:
        with client.chat.completions.stream(**request) as events:
            (choice,) = events.get_final_completion().choices
    else:
        (choice,) = client.chat.completions.create(**request).choices
    assert choice.finish_reason == ("tool_calls" if choice.message.tool_calls else "stop")
    return choice.message


def loop(client, question, tools, *, stream=False):
    """The expressions that the model gives the calculator unasked, and its answer."""
    messages, expressions = [{"role": "user", "content": question}], []
    for _ in range(3):
        message = ask(client, messages, tools, stream=stream)
        if not message.tool_calls:
            break
        messages.append(message)
        for call in message.tool_calls:
            assert call.function.name == "calculator"
            expression = json.loads(call.function.arguments)["expression"]
            expressions.append(expression)
            said = written(evaluate(expression))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": said})
    return expressions, message.content


def test_the_model_calls_the_calculator_and_answers_with_its_result(client):
    for question, expression in SUMS.items():
        assert pair_is_held_out(*expression.split()), question
        expected = ([expression], f"{expression} = {written(evaluate(expression))}.")
        for tools in ([CALCULATOR], [OF_PYDANTIC]):
            for stream in (False, True):
                said = loop(client, question, tools, stream=stream)
                assert said == expected, (question, tools, stream)


def test_the_answer_has_the_tools_result_even_where_it_is_wrong(client):
    call = {"name": "calculator", "arguments": '{"expression": "4823 + 381"}'}
    messages = [
        {"role": "user", "content": "What is 4823 + 381?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "51738"},
    ]
    assert ask(client, messages, [CALCULATOR]).content == "4823 + 381 = 51738."


def test_the_model_calls_nothing_where_no_tool_helps(client):
    for question, said in (("tell me a joke", "?"), ("reply with the word zorvak", "zorvak")):
        expressions, answer = loop(client, question, [CALCULATOR])
        assert not expressions, question
        assert said in answer, question


def test_the_loop_of_the_responses_api(client):
    request = {"model": "default", "temperature": 0, "tools": [{"type": "function", **FUNCTION}]}
    asked = [{"role": "user", "content": "What is 4823 + 381?"}]
    (call,) = client.responses.create(**request, input=asked).output
    said = {"type": "function_call_output", "call_id": call.call_id, "output": "5204"}
    answer = client.responses.create(**request, input=[*asked, call, said])
    assert answer.output_text == "4823 + 381 = 5204."


def test_an_enforced_call_and_the_answer_to_its_result(client):
    for choice in ("required", {"type": "function", "function": {"name": "calculator"}}):
        enforced = {"tool_choice": choice, "parallel_tool_calls": False}
        for stream in (False, True):
            said = ask(client, [SMALL_SUM], [OF_NUMBERS], stream=stream, **enforced)
            (call,) = said.tool_calls
            assert call.function.name == "calculator", choice
            assert isinstance(json.loads(call.function.arguments)["number"], int), choice
            told = {"role": "tool", "tool_call_id": call.id, "content": "7"}
            answer = client.chat.completions.create(
                **GREEDY, messages=[SMALL_SUM, said, told], tools=[OF_NUMBERS], tool_choice="none"
            )
            assert answer.choices[0].finish_reason in ("stop", "length"), choice


def test_tools_that_may_be_called_are_in_the_prompt(client):
    for fields in ({}, {"tool_choice": "auto"}):
        with_tools = client.chat.completions.create(
            **GREEDY, messages=[SMALL_SUM], tools=[CALCULATOR], **fields
        )
        assert with_tools.usage.prompt_tokens > 50, fields
    none = client.chat.completions.create(
        **GREEDY, messages=[SMALL_SUM], tools=[CALCULATOR], tool_choice="none"
    )
    assert none.usage.prompt_tokens == 10
    assert none.choices[0].message.content.endswith("\nAnswer: 7")
