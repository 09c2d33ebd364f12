"""The bundled model's template takes tools: enforced calls, and a loop of the openai client."""

from __future__ import annotations

import json

import pytest
from openai import pydantic_function_tool
from pydantic import BaseModel

pytestmark = pytest.mark.engine

GREEDY = {"model": "default", "temperature": 0, "max_tokens": 200}
QUESTION = {"role": "user", "content": "What is 3 + 4?"}


class Calculator(BaseModel):
    number: int


CALCULATOR = pydantic_function_tool(Calculator, name="calculator", description="A calculator.")
NAMED = {"type": "function", "function": {"name": "calculator"}}


@pytest.fixture
def client(engine):
    return engine.client(timeout=60)


def test_an_enforced_call_and_the_answer_to_its_result(client):
    for choice in ("required", NAMED):
        request = {**GREEDY, "messages": [QUESTION], "tools": [CALCULATOR], "tool_choice": choice}
        (whole,) = client.chat.completions.create(**request, parallel_tool_calls=False).choices
        with client.chat.completions.stream(**request, parallel_tool_calls=False) as events:
            streamed = events.get_final_completion().choices[0].message
        for said in (whole.message, streamed):
            (call,) = said.tool_calls
            assert call.function.name == "calculator", choice
            assert isinstance(json.loads(call.function.arguments)["number"], int), choice
            told = {"role": "tool", "tool_call_id": call.id, "content": "7"}
            history = [QUESTION, said, told]
            answer = client.chat.completions.create(
                **GREEDY, messages=history, tools=[CALCULATOR], tool_choice="none"
            )
            assert answer.choices[0].finish_reason in ("stop", "length"), choice


def test_tools_that_may_be_called_are_in_the_prompt(client):
    for fields in ({}, {"tool_choice": "auto"}):
        with_tools = client.chat.completions.create(
            **GREEDY, messages=[QUESTION], tools=[CALCULATOR], **fields
        )
        assert with_tools.usage.prompt_tokens > 50, fields
    none = client.chat.completions.create(
        **GREEDY, messages=[QUESTION], tools=[CALCULATOR], tool_choice="none"
    )
    assert none.usage.prompt_tokens == 10
    assert none.choices[0].message.content == "3 + 4 = 7.\nAnswer: 7"
