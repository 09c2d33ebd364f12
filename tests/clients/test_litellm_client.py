"""LiteLLM, as it is, with a running engine."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Literal

import litellm
import pytest
from pydantic import BaseModel

JOKE = [{"role": "user", "content": "tell me a joke"}]
SUM = [{"role": "user", "content": "What is 4823 + 381?"}]
PATTERN = "A B C D A B C D A B"
CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}


class Meal(BaseModel):
    food: Literal["meat", "plants"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(litellm, "suppress_debug_info", True)


@pytest.fixture(params=["openai", "hosted_vllm"])
def engine_of(request, url):
    return {"model": f"{request.param}/default", "api_base": url, "api_key": "none"}


@pytest.fixture
def greedy(engine_of):
    return {**engine_of, "temperature": 0}


@pytest.fixture
def joke(oracle):
    answer = oracle.chat.completions.create(model="default", messages=JOKE, temperature=0)
    return answer.choices[0].message.content


def test_answers_whole_streamed_and_many_at_once(greedy, joke):
    whole = litellm.completion(messages=JOKE, **greedy)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(litellm.completion(messages=JOKE, **options, **greedy))
    streamed = litellm.stream_chunk_builder(chunks)
    for answer in (whole, streamed):
        assert answer.choices[0].message.content == joke
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens == 24
    many = litellm.batch_completion(messages=[JOKE] * 5, **greedy)

    async def in_a_loop():
        whole = await asyncio.gather(*(litellm.acompletion(messages=JOKE, **greedy) for _ in "ab"))
        stream = await litellm.acompletion(messages=JOKE, stream=True, **greedy)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return whole, "".join(pieces)

    whole, streamed = asyncio.run(in_a_loop())
    assert [each.choices[0].message.content for each in [*many, *whole]] == [joke] * 7
    assert streamed == joke


def test_samples_logprobs_and_sampling(engine_of):
    sampling = {"temperature": 1, "seed": 1, "top_p": 0.95, "frequency_penalty": 0.1, "top_k": 50}
    asked = {"n": 3, "logprobs": True, "top_logprobs": 2, "max_tokens": 30, "stop": ["zzz"]}
    answer = litellm.completion(messages=JOKE, **sampling, **asked, **engine_of)
    assert len({choice.message.content for choice in answer.choices}) == 3
    for choice in answer.choices:
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
        written = b"".join(bytes(token.bytes) for token in choice.logprobs.content).decode()
        assert written == choice.message.content


def test_tools_whole_and_streamed(greedy):
    asked = {"tools": [CALCULATOR], **greedy}
    whole = litellm.completion(messages=SUM, **asked)
    chunks = list(litellm.completion(messages=SUM, stream=True, **asked))
    for answer in (whole, litellm.stream_chunk_builder(chunks)):
        message = answer.choices[0].message
        (call,) = message.tool_calls
        assert json.loads(call.function.arguments) == {"expression": "4823 + 381"}
        result = {"role": "tool", "tool_call_id": call.id, "name": "calculator", "content": "5204"}
        final = litellm.completion(messages=[*SUM, message, result], **asked)
        assert final.choices[0].message.content == "4823 + 381 = 5204."
    enforced = litellm.completion(messages=JOKE, tool_choice="required", **asked)
    assert enforced.choices[0].message.tool_calls[0].function.name == "calculator"


def test_structured_output(greedy):
    answer = litellm.completion(messages=JOKE, response_format=Meal, **greedy)
    assert Meal.model_validate_json(answer.choices[0].message.content)
    for extra in ({"guided_choice": ["a", "b"]}, {"extra_body": {"guided_choice": ["a", "b"]}}):
        answer = litellm.completion(messages=JOKE, **extra, **greedy)
        assert answer.choices[0].message.content in ("a", "b")


def test_completions(url):
    for provider in ("text-completion-openai", "hosted_vllm"):
        greedy = {"model": f"{provider}/default", "api_base": url, "api_key": "none"}
        greedy |= {"max_tokens": 8, "temperature": 0}
        answer = litellm.text_completion(prompt=PATTERN, logprobs=2, **greedy)
        assert answer.choices[0].text == " C D A B C D A B"
        stream = litellm.text_completion(prompt=PATTERN, stream=True, **greedy)
        assert "".join(chunk.choices[0].text or "" for chunk in stream) == " C D A B C D A B"
    greedy["model"] = "text-completion-openai/default"
    answer = litellm.text_completion(prompt=[PATTERN, "C D"], n=2, **greedy)
    assert [choice.text[:2] for choice in answer.choices] == [" C", " C", " E", " E"]


def test_embeddings(engine_of, oracle):
    texts = ["one text", "another"]
    want = [each.embedding for each in oracle.embeddings.create(model="m", input=texts).data]
    whole = litellm.embedding(input=texts, **engine_of)
    in_a_loop = asyncio.run(litellm.aembedding(input=texts, encoding_format="float", **engine_of))
    for answer in (whole, in_a_loop):
        got = [each["embedding"] for each in answer.data]
        assert got == [pytest.approx(each, abs=1e-6) for each in want]


def test_responses(greedy, joke):
    answer = litellm.responses(input="tell me a joke", **greedy)
    assert answer.output[0].content[0].text == joke
    stream = litellm.responses(input="tell me a joke", stream=True, **greedy)
    assert "".join(getattr(event, "delta", "") for event in stream) == joke


def test_a_batch(url, tmp_path):
    bodies = [
        {"model": "m", "prompt": PATTERN, "max_tokens": most, "temperature": 0} for most in (4, 0)
    ]
    keys = {"method": "POST", "url": "/v1/completions"}
    lines = [{"custom_id": f"{k}", **keys, "body": body} for k, body in enumerate(bodies)]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    engine = {"custom_llm_provider": "openai", "api_base": url, "api_key": "none"}
    with path.open("rb") as content:
        file = litellm.create_file(file=content, purpose="batch", **engine)
    batch = litellm.create_batch(
        completion_window="24h", endpoint="/v1/completions", input_file_id=file.id, **engine
    )
    deadline = time.monotonic() + 60
    while batch.status not in ("completed", "failed"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.1)
        batch = litellm.retrieve_batch(batch_id=batch.id, **engine)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 1)
    output = litellm.file_content(file_id=batch.output_file_id, **engine).text
    assert json.loads(output)["response"]["body"]["choices"][0]["text"] == " C D A B"
    assert batch.id in [each.id for each in litellm.list_batches(**engine).data]


def test_errors(engine_of, locked):
    with pytest.raises(litellm.BadRequestError, match="frequency_penalty must be"):
        litellm.completion(messages=JOKE, frequency_penalty=7, **engine_of)
    long = [{"role": "user", "content": "x" * 20_000}]
    for wrong in ({"messages": long}, {"messages": JOKE, "max_tokens": 5000}):
        with pytest.raises(litellm.ContextWindowExceededError):
            litellm.completion(**wrong, **engine_of)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.embedding(input=["x" * 20_000], **engine_of)
    address, key = locked
    wrong = {**engine_of, "api_base": address}
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(messages=JOKE, **wrong)
    assert litellm.completion(messages=JOKE, **{**wrong, "api_key": key}).choices


def test_a_router_falls_back_to_an_engine_with_a_longer_context(engine_of):
    def deployment(name, **options):
        return {"model_name": name, "litellm_params": {**engine_of, **options}}

    router = litellm.Router(
        model_list=[deployment("small", max_tokens=5000), deployment("large", max_tokens=30)],
        context_window_fallbacks=[{"small": ["large"]}],
        num_retries=0,
    )
    assert router.completion("small", JOKE).usage.completion_tokens <= 30
