"""The engine's own routes, with a real manager and model behind them."""

from __future__ import annotations

import json
import time
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
def test_flushing_the_cache_ends_prefix_hits(engine, path):
    num_cached_tokens(engine)
    before = num_cached_tokens(engine)
    assert before > 0
    assert post(engine, path, {})["flushed_tokens"] >= before
    assert num_cached_tokens(engine) == 0
    assert num_cached_tokens(engine) == before


def test_embeddings_have_length_one(engine):
    client = engine.client()
    answer = client.embeddings.create(model="", input=["A B C", "C D", "A B C"])
    one, other, same = (np.array(each.embedding) for each in answer.data)
    np.testing.assert_allclose([one @ one, one @ same], 1.0, atol=1e-5)
    assert one @ other < 0.9999
    short = client.embeddings.create(model="", input="A B C", dimensions=4).data[0].embedding
    np.testing.assert_allclose(short, one[:4] / np.linalg.norm(one[:4]), atol=1e-5)


def test_server_info_has_the_managers_counters(engine):
    num_cached_tokens(engine)
    deadline = time.monotonic() + 60
    while True:  # the manager says about once a second
        with urllib.request.urlopen(engine.url + "/server_info", timeout=60) as answer:
            state = json.loads(answer.read())["internal_states"][0]
        if state.get("num_generated_tokens", 0) > 0:
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert state["num_pages"] >= state["num_free_pages"] > 0
    assert state["num_running_prompts"] == 0


def test_generate_and_the_openai_protocols_agree(engine):
    """``/generate`` answers like chat completions; in SGLang's shape it continues plain text."""
    body = {"model": "", "temperature": 0.0, "max_tokens": 12}
    native = post(engine, "/generate", {**body, "system": "be brief", "prompt": "A B C"})
    chat = engine.client().chat.completions.create(
        **body,
        messages=[
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "A B C"},
        ],
    )
    assert native["text"] == native["output"] == chat.choices[0].message.content
    assert native["usage"]["completion_tokens"] == chat.usage.completion_tokens
    greedy = {"temperature": 0.0, "max_new_tokens": 8}
    logprobs = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 1}
    told = post(engine, "/generate", {"input_ids": IDS, "sampling_params": greedy, **logprobs})
    plain = engine.client().completions.create(
        model="", prompt=IDS, temperature=0, max_tokens=8, echo=True, logprobs=1
    )
    assert told["text"] == plain.choices[0].text[-len(told["text"]) :]
    info = told["meta_info"]
    both = info["input_token_logprobs"] + info["output_token_logprobs"]
    assert [entry[0] for entry in both] == plain.choices[0].logprobs.token_logprobs


def test_tokenize_and_detokenize_are_inverse(engine):
    text = "Once upon a time"
    tokens = post(engine, "/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
    assert post(engine, "/detokenize", {"tokens": tokens}) == {"prompt": text}
