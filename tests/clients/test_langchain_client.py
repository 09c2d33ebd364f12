"""LangChain's models of OpenAI, as they are, with a running engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Literal

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

JOKE = "tell me a joke"
SUM = "What is 4823 + 381?"
PATTERN = "A B C D A B C D A B"


class Meal(BaseModel):
    """What a dinosaur ate."""

    food: Literal["meat", "plants"]
    often: bool


class calculator(BaseModel):  # noqa: N801, the name of the tool that the model knows
    """Evaluate an arithmetic expression."""

    expression: str


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One for all tests: LangChain keeps connections to an address, whatever becomes of a loop."""
    made = asyncio.new_event_loop()
    yield made
    made.close()


def chat(url, **options):
    made = {"model": "default", "base_url": url, "api_key": "none", "max_retries": 0}
    return ChatOpenAI(**{**made, "temperature": 0, **options})


def said(oracle, text):
    messages = [{"role": "user", "content": text}]
    answer = oracle.chat.completions.create(model="default", messages=messages, temperature=0)
    return answer.choices[0].message.content, answer.usage.completion_tokens


def together(chunks):
    first, *others = chunks
    return sum(others, start=first)


@pytest.mark.parametrize("options", [{}, {"use_responses_api": True}])
def test_answers_whole_streamed_and_many_at_once(url, oracle, loop, options):
    text, tokens = said(oracle, JOKE)
    model = chat(url, stream_usage=True, **options)
    whole, streamed = model.invoke(JOKE), together(list(model.stream(JOKE)))
    for answer in (whole, streamed):
        assert answer.text == text
        assert answer.usage_metadata["output_tokens"] == tokens
    assert [each.text for each in model.batch([JOKE] * 5)] == [text] * 5

    async def in_a_loop():
        whole = await asyncio.gather(*(model.ainvoke(JOKE) for _ in range(5)))
        return [*whole, together([chunk async for chunk in model.astream(JOKE)])]

    assert [each.text for each in loop.run_until_complete(in_a_loop())] == [text] * 6


def test_a_conversation_and_sampling(url):
    messages = [
        SystemMessage("Be kind."),
        HumanMessage("Hi"),
        AIMessage("Hello"),
        HumanMessage("Hm"),
    ]
    sampling = {"temperature": 1, "top_p": 0.9, "frequency_penalty": 0.5, "presence_penalty": 0.5}
    model = chat(url, seed=3, max_tokens=10, stop=["zzz"], logit_bias={5: 1}, **sampling)
    one, other = model.invoke(messages), model.invoke(messages)
    assert one.content == other.content
    assert one.usage_metadata["output_tokens"] <= 10


def test_samples_and_logprobs(url):
    model = chat(url, n=3, temperature=1, seed=1).bind(logprobs=True, top_logprobs=2)
    (samples,) = model.bound.generate([[HumanMessage(JOKE)]], **model.kwargs).generations
    assert len({sample.text for sample in samples}) == 3
    for sample in samples:
        tokens = sample.generation_info["logprobs"]["content"]
        assert b"".join(bytes(each["bytes"]) for each in tokens).decode() == sample.text
        assert all(len(each["top_logprobs"]) == 2 for each in tokens)


@pytest.mark.parametrize("options", [{}, {"use_responses_api": True}])
def test_tools_whole_and_streamed(url, options):
    model = chat(url, **options).bind_tools([calculator])
    for ask in (model.invoke, lambda messages: together(list(model.stream(messages)))):
        answer = ask([HumanMessage(SUM)])
        (call,) = answer.tool_calls
        assert (call["name"], call["args"]) == ("calculator", {"expression": "4823 + 381"})
        result = ToolMessage("5204", tool_call_id=call["id"])
        assert model.invoke([HumanMessage(SUM), answer, result]).text == "4823 + 381 = 5204."


@pytest.mark.parametrize("choice", ["any", "Meal"])
def test_calls_can_be_enforced(url, choice):
    model = chat(url).bind_tools([Meal], tool_choice=choice, strict=True)
    (call,) = model.invoke(JOKE).tool_calls
    assert Meal.model_validate(call["args"])


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("options", [{}, {"use_responses_api": True}])
def test_structured_output_whole_and_streamed(url, method, options):
    model = chat(url, **options).with_structured_output(Meal, method=method)
    whole = model.invoke("What did Triceratops eat?")
    assert isinstance(whole, Meal)
    assert list(model.stream("What did Triceratops eat?"))[-1] == whole


def test_fields_of_the_engine(url):
    model = chat(url, extra_body={"guided_choice": ["yes", "no"], "top_k": 5})
    assert model.invoke(JOKE).content in ("yes", "no")


def test_completions(url):
    model = OpenAI(model="default", base_url=url, api_key="none", temperature=0, max_tokens=8)
    assert model.invoke(PATTERN) == " C D A B C D A B"
    assert "".join(model.stream(PATTERN)) == " C D A B C D A B"
    several = model.bind(n=2, logprobs=2)
    for samples in several.bound.generate([PATTERN, "C D"], **several.kwargs).generations:
        assert len(samples) == 2
        assert all(len(each.generation_info["logprobs"]["tokens"]) == 8 for each in samples)


def test_embeddings(url, oracle, loop):
    texts = ["one text", "another"]
    want = [each.embedding for each in oracle.embeddings.create(model="m", input=texts).data]
    given = {"model": "default", "base_url": url, "api_key": "none"}
    model = OpenAIEmbeddings(**given, check_embedding_ctx_length=False)
    got = model.embed_documents(texts)
    assert [pytest.approx(each, abs=1e-6) for each in want] == got
    assert len(loop.run_until_complete(model.aembed_query("one text"))) == len(got[0])


def test_errors(url, locked):
    with pytest.raises(openai.BadRequestError, match="temperature") as raised:
        chat(url, temperature=700).invoke(JOKE)
    assert raised.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="context_length_exceeded") as raised:
        chat(url).invoke("x" * 20_000)
    assert type(raised.value).__name__ == "OpenAIContextOverflowError"
    image = HumanMessage([{"type": "image_url", "image_url": {"url": "http://a/b.png"}}])
    with pytest.raises(openai.BadRequestError, match="image_url"):
        chat(url).invoke([image])
    address, key = locked
    with pytest.raises(openai.AuthenticationError):
        chat(address).invoke(JOKE)
    assert chat(address, api_key=key).invoke(JOKE).content
