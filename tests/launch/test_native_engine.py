"""The engine's own routes, with a real manager and model behind them."""

from __future__ import annotations

import json
import urllib.request

import numpy as np
import pytest

pytestmark = pytest.mark.engine

IDS = [20 + i % 150 for i in range(100)]


def post(engine, path, body):
    request = urllib.request.Request(
        engine.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def num_cached_tokens(engine):
    answer = engine.client().completions.create(model="", prompt=IDS, max_tokens=1)
    return answer.usage.prompt_tokens_details.cached_tokens


@pytest.mark.parametrize("path", ["/flush_cache", "/reset_prefix_cache"])
def test_prefix_hits_vanish(engine, path):
    num_cached_tokens(engine)
    before = num_cached_tokens(engine)
    assert before > 0
    assert post(engine, path, {})["flushed_tokens"] >= before
    assert num_cached_tokens(engine) == 0
    assert num_cached_tokens(engine) == before


def test_vectors_of_length_one(engine):
    client = engine.client()
    answer = client.embeddings.create(model="", input=["A B C", "C D", "A B C"])
    one, other, same = (np.array(each.embedding) for each in answer.data)
    np.testing.assert_allclose([one @ one, one @ same], 1.0, atol=1e-5)
    assert one @ other < 0.9999
    short = client.embeddings.create(model="", input="A B C", dimensions=4).data[0].embedding
    np.testing.assert_allclose(short, one[:4] / np.linalg.norm(one[:4]), atol=1e-5)


def test_tokens_there_and_back(engine):
    text = "Once upon a time"
    tokens = post(engine, "/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
    assert post(engine, "/detokenize", {"tokens": tokens}) == {"prompt": text}
