"""Instructor, as it is, with a running engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from datetime import date
from typing import Literal

import instructor
import litellm
import openai
import pytest
from instructor import Mode
from instructor.batch import BatchProcessor
from pydantic import BaseModel, Field, field_validator

MESSAGES = [{"role": "user", "content": "What did Triceratops eat?"}]
ASK = {"model": "default", "messages": MESSAGES, "temperature": 0}
ENFORCED = [Mode.JSON_SCHEMA, Mode.TOOLS, Mode.TOOLS_STRICT, Mode.RESPONSES_TOOLS]


class Meal(BaseModel):
    """What a dinosaur ate."""

    food: Literal["meat", "plants"]
    often: bool


class Kinds(BaseModel):
    """One field of each kind of schema that Pydantic writes."""

    when: date
    price: float
    pair: tuple[int, bool]
    counts: dict[str, bool] = Field(max_length=1)
    perhaps: int | None = None
    small: int = Field(gt=0, lt=10)
    letters: str = Field(pattern="^a{1,3}$")
    few: list[bool] = Field(max_length=3)
    meal: Meal


class calculator(BaseModel):  # noqa: N801, the name of the tool that the model knows
    """Evaluate an arithmetic expression."""

    expression: str


def client(url, mode, of=openai.OpenAI):
    return instructor.from_openai(of(base_url=url, api_key="none", max_retries=0), mode=mode)


@pytest.mark.parametrize("mode", ENFORCED, ids=str)
def test_the_first_answer_has_the_form(url, mode):
    completions = client(url, mode).chat.completions
    assert isinstance(completions.create(response_model=Meal, max_retries=0, **ASK), Meal)
    for seed in range(5):
        random = {**ASK, "temperature": 1, "max_tokens": 1000}
        if mode is not Mode.RESPONSES_TOOLS:
            random["seed"] = seed
        assert completions.create(response_model=Kinds, max_retries=0, **random)


@pytest.mark.parametrize("mode", ENFORCED, ids=str)
def test_answers_in_parts_and_in_a_loop(url, mode):
    completions = client(url, mode).chat.completions
    whole = completions.create(response_model=Meal, **ASK)
    *_, last = completions.create_partial(response_model=Meal, **ASK)
    assert last.model_dump() == whole.model_dump()

    async def in_a_loop():
        create = client(url, mode, openai.AsyncOpenAI).chat.completions.create
        return await asyncio.gather(*(create(response_model=Meal, **ASK) for _ in range(4)))

    answers = asyncio.run(in_a_loop())
    assert [each.model_dump() for each in answers] == [whole.model_dump()] * 4


@pytest.mark.parametrize("mode", [Mode.JSON_SCHEMA, Mode.TOOLS], ids=str)
def test_an_answer_that_a_validator_refuses_is_asked_for_again(url, mode):
    seen = []

    class Picky(Meal):
        @field_validator("food")
        @classmethod
        def second(cls, value):
            seen.append(value)
            if len(seen) < 2:
                raise ValueError("say it again")
            return value

    answer, raw = client(url, mode).chat.completions.create_with_completion(
        response_model=Picky, max_retries=2, **ASK
    )
    assert [answer.food] == seen[1:]
    assert raw.usage.prompt_tokens > 20  # of both attempts


def test_calls_that_the_model_decides_on(url):
    completions = client(url, Mode.PARALLEL_TOOLS).chat.completions
    ask = {**ASK, "messages": [{"role": "user", "content": "What is 4823 + 381?"}]}
    found = completions.create(response_model=Iterable[calculator], **ask)
    assert list(found) == [calculator(expression="4823 + 381")]


def test_simple_types(url):
    completions = client(url, Mode.TOOLS).chat.completions
    assert isinstance(completions.create(response_model=bool, **ASK), bool)
    assert completions.create(response_model=Literal["a", "b"], **ASK) in ("a", "b")


def test_other_ways_to_make_one(url):
    made = instructor.from_provider("openai/default", base_url=url, api_key="none")
    ask = {name: value for name, value in ASK.items() if name != "model"}
    assert isinstance(made.chat.completions.create(response_model=Meal, **ask), Meal)
    made = instructor.from_litellm(litellm.completion)
    ask |= {"model": "openai/default", "api_base": url, "api_key": "none"}
    assert isinstance(made.chat.completions.create(response_model=Meal, **ask), Meal)


def test_a_batch(url, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    path = str(tmp_path / "in.jsonl")
    batches = BatchProcessor("openai/default", Meal)
    batches.create_batch_from_messages(
        messages_list=[MESSAGES] * 3, file_path=path, max_tokens=100, temperature=0
    )
    batch_id = batches.submit_batch(path)
    deadline = time.monotonic() + 60
    while batches.get_batch_status(batch_id)["status"] != "completed":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    results = batches.retrieve_results(batch_id)
    assert len(results) == 3
    assert all(isinstance(each.result, Meal) for each in results)


def test_errors_say_what_the_engine_said(url):
    completions = client(url, Mode.JSON_SCHEMA).chat.completions
    long = {**ASK, "messages": [{"role": "user", "content": "x" * 20_000}]}
    with pytest.raises(Exception, match="maximum context length is 2048"):
        completions.create(response_model=Meal, max_retries=0, **long)

    class Tags(BaseModel):
        tags: set[str]

    for mode, field in ((Mode.JSON_SCHEMA, "response_format"), (Mode.TOOLS, "tools")):
        completions = client(url, mode).chat.completions
        with pytest.raises(Exception, match=f"{field} cannot be compiled.*uniqueItems"):
            completions.create(response_model=Tags, max_retries=0, **ASK)
