"""The unmodified openai client with a running engine: every API that the engine serves."""

from __future__ import annotations

import asyncio
import json
import time

import numpy as np
import openai
import pytest

pytestmark = pytest.mark.engine

PROMPT = "A B C D A B C D A B"
SAID = " C D A B C D A B"
JOKE = [{"role": "user", "content": "tell me a joke"}]
GREEDY = {"model": "default", "temperature": 0}


@pytest.fixture
def client(engine):
    return engine.client(timeout=60)


def test_completions_whole_and_streamed(client):
    request = {**GREEDY, "prompt": [PROMPT, PROMPT], "max_tokens": 8, "n": 2, "logprobs": 2}
    whole = client.completions.create(**request)
    assert [choice.text for choice in whole.choices] == [SAID] * 4
    texts, usage = [""] * 4, None
    for chunk in client.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [SAID] * 4
    assert usage.completion_tokens == whole.usage.completion_tokens == 32
    for choice in whole.choices:
        assert len(choice.logprobs.token_logprobs) == 8
        for one, top in zip(
            choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
        ):
            assert one == max(top.values()) <= 0


def test_chat_whole_and_streamed(client):
    whole = client.chat.completions.create(**GREEDY, messages=JOKE, logprobs=True, top_logprobs=2)
    (choice,) = whole.choices
    assert choice.finish_reason == "stop"
    written = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
    assert written.decode().startswith(choice.message.content)
    chunks = client.chat.completions.create(**GREEDY, messages=JOKE, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == (
        choice.message.content
    )


def test_responses_whole_and_streamed(client):
    request = {"model": "default", "temperature": 0, "input": "tell me a joke"}
    said = client.chat.completions.create(**GREEDY, messages=JOKE).choices[0].message.content
    assert client.responses.create(**request).output_text == said
    with client.responses.stream(**request) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(deltas) == stream.get_final_response().output_text == said


def test_structured_output(client):
    choices = ["the red one", "the blue one"]
    answer = client.chat.completions.create(
        **GREEDY, messages=JOKE, extra_body={"guided_choice": choices}
    )
    assert answer.choices[0].message.content in choices
    schema = {"type": "object", "properties": {"old": {"type": "boolean"}}, "required": ["old"]}
    form = {"name": "age", "schema": {**schema, "additionalProperties": False}, "strict": True}
    answer = client.chat.completions.create(
        **GREEDY,
        messages=JOKE,
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": form},
    )
    if answer.choices[0].finish_reason == "stop":
        assert type(json.loads(answer.choices[0].message.content)["old"]) is bool


def test_embeddings(client):
    """As base64, which the client asks for by itself, and as numbers."""
    one, other = (
        client.embeddings.create(model="default", input=[PROMPT, "C D"], **form).data
        for form in ({}, {"encoding_format": "float"})
    )
    for left, right in zip(one, other, strict=True):
        np.testing.assert_allclose(left.embedding, right.embedding, atol=1e-6)
        assert np.linalg.norm(left.embedding) == pytest.approx(1.0, abs=1e-5)


def test_batch(client):
    lines = [
        {
            "custom_id": f"{number}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": PROMPT, "max_tokens": 8, "temperature": temperature},
        }
        for number, temperature in enumerate([0, "cold", 0])
    ]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )
    deadline = time.monotonic() + 60
    while batch.status != "completed":
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (3, 2, 1)
    answers = [json.loads(line) for line in client.files.content(batch.output_file_id).iter_lines()]
    assert [answer["custom_id"] for answer in answers] == ["0", "2"]
    assert all(answer["response"]["body"]["choices"][0]["text"] == SAID for answer in answers)
    (error,) = map(json.loads, client.files.content(batch.error_file_id).iter_lines())
    assert error["response"]["body"]["error"]["param"] == "temperature"
    assert batch.id in [each.id for each in client.batches.list(limit=1)]
    for file_id in (batch.input_file_id, batch.output_file_id, batch.error_file_id):
        assert client.files.delete(file_id).deleted


def test_async(engine):
    async def everyone():
        async with openai.AsyncOpenAI(
            api_key="none", base_url=f"{engine.url}/v1", max_retries=0, timeout=60
        ) as client:

            async def whole():
                answer = await client.completions.create(**GREEDY, prompt=PROMPT, max_tokens=8)
                return answer.choices[0].text

            async def streamed():
                chunks = await client.completions.create(
                    **GREEDY, prompt=PROMPT, max_tokens=8, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in chunks])

            return await asyncio.gather(
                *(whole() for _ in range(16)), *(streamed() for _ in range(16))
            )

    assert asyncio.run(everyone()) == [SAID] * 32


def test_errors_name_the_field(client):
    for field, value in (("temperature", -1), ("prompt", 5), ("n", 0), ("suffix", "x")):
        with pytest.raises(openai.BadRequestError) as error:
            client.completions.create(**{**GREEDY, "prompt": PROMPT, field: value})
        assert error.value.param == field
    tools = [{"type": "function", "function": {"name": "f"}}] * 2
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**GREEDY, messages=JOKE, tools=tools)
    assert error.value.param == "tools"
