"""``/v1/embeddings``, as the openai client sends and reads it."""

from __future__ import annotations

import asyncio
import base64

import numpy as np
import pytest
from fake_engine import CONFIG, TOKENIZER, ids_of, pooled_state
from rows import each_row

from tokasaurus.protocol.messages import Pooling

PATH = "/v1/embeddings"


def expected(request, dimensions=None):
    vector = pooled_state(request)[:dimensions].astype(np.float64)
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("encoding_format", [None, "float", "base64"])
def test_the_openai_client_reads_vectors_of_length_one(server, encoding_format):
    """The client asks for base64 by default."""
    options = {} if encoding_format is None else {"encoding_format": encoding_format}
    with server.client() as client:
        answer = client.embeddings.create(model="m", input=["the cat", "a mat"], **options)
    assert answer.model == "m"
    assert [each.index for each in answer.data] == [0, 1]
    for each, request in zip(answer.data, server.engine.requests, strict=True):
        vector = each.embedding
        if encoding_format == "base64":
            vector = np.frombuffer(base64.b64decode(vector), "<f4")
        np.testing.assert_allclose(vector, expected(request), atol=1e-6)
        assert request.pooling is Pooling.MEAN
    num_tokens = len(TOKENIZER.encode("the cat")) + len(TOKENIZER.encode("a mat"))
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == num_tokens


def test_the_async_openai_client_reads_embeddings(server):
    async def ask():
        async with server.async_client() as client:
            return await client.embeddings.create(model="m", input="the cat", dimensions=3)

    vector = asyncio.run(ask()).data[0].embedding
    np.testing.assert_allclose(vector, expected(server.engine.requests[0], 3), atol=1e-6)


@each_row("value", ["the cat", ["the cat"], ids_of("the cat"), [ids_of("the cat")]])
def test_every_shape_of_input_is_the_same_prompt(server, value):
    server.engine.received.clear()
    data = server.post(PATH, {"input": value}).json["data"]
    assert len(data) == 1
    ids = TOKENIZER.encode("the cat") if isinstance(value, str) or value == ["the cat"] else None
    assert server.engine.requests[0].prompt_ids.tolist() == (ids or ids_of("the cat"))


def test_pooling_and_priority_reach_the_engine(server):
    body = {"input": "a", "pooling": "last", "priority": 7}
    assert server.post(PATH, body).status == 200
    request = server.engine.requests[0]
    assert request.pooling is Pooling.LAST
    assert request.priority == 7


@each_row(
    "body, param",
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": 3}, "input"),
        ({"input": ["a", 3]}, "input"),
        ({"input": [10**9]}, "input"),
        ({"input": [5] * CONFIG.max_request_tokens}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 9}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "pooling": "max"}, "pooling"),
        ({"input": "a", "priority": 10**9}, "priority"),
        ({"input": "a", "user": 3}, "user"),
        ({"input": "a", "normalize": False}, "normalize"),
        ({"input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"input": "a", "temperature": 1.0}, "temperature"),
        ({"input": "a", "stream": True}, "stream"),
    ],
)
def test_wrong_values_are_refused_by_field(server, body, param):
    answer = server.post(PATH, body)
    assert answer.status == 400
    assert answer.error["param"] == param
    assert param in answer.error["message"]


def test_embeddings_of_many_inputs_keep_their_order(server):
    inputs = [[1 + i % 300, 2 + i % 97] for i in range(200)]
    data = server.post(PATH, {"input": inputs}).json["data"]
    assert [each["index"] for each in data] == list(range(200))
    for each, request in zip(data, server.engine.requests, strict=True):
        np.testing.assert_allclose(each["embedding"], expected(request), atol=1e-6)
