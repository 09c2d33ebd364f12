"""What the client sends, and what it makes of answers."""

from __future__ import annotations

import base64
import json
import ssl
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from file_server import Answer

from tokasaurus.client import Client
from tokasaurus.errors import ConfigError, EngineError, RequestError

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SAID = {"id": "x", "model": "m", "choices": [{"index": 0, "text": "said", "finish_reason": "stop"}]}


def sent(server):
    return json.loads(server.questions[-1].body)


def test_the_address_has_v1_or_not(server):
    server.answers[TEXT] = Answer.json(SAID)
    for url in (server.url, f"{server.url}/", f"{server.url}/v1", f"{server.url}/v1/"):
        with Client(url) as client:
            assert client.base_url == server.url
            client.complete("a")
    with Client(server.address) as client:  # without http://
        client.complete("a")


def test_the_environment_names_address_and_key(server, monkeypatch):
    server.answers[TEXT] = Answer.json(SAID)
    with Client(server.url) as client:
        client.complete("a")
    assert "authorization" not in server.questions[-1].headers
    monkeypatch.setenv("TOKASAURUS_BASE_URL", server.url)
    monkeypatch.setenv("TOKASAURUS_API_KEY", "sk-one admin, sk-two")
    with Client() as client:
        client.complete("a")
    assert server.questions[-1].headers["authorization"] == "Bearer sk-one"
    with Client(api_key="sk-mine") as client:
        client.complete("a")
        assert "sk-mine" not in repr(client._async._connection.address)
    assert server.questions[-1].headers["authorization"] == "Bearer sk-mine"


def test_a_wrong_address_is_refused():
    for url in ("ftp://host", "http://", "http://host:port", "http://host?x=1"):
        with pytest.raises(ConfigError, match="base_url"):
            Client(url)


def test_a_client_of_http_reads_no_certificates(server, monkeypatch):
    """Each pool of connections would read them, which took seconds."""

    def read(*args, **kwargs):
        raise AssertionError("certificates are read")

    for name in ("load_default_certs", "load_verify_locations"):
        monkeypatch.setattr(ssl.SSLContext, name, read)
    server.answers[TEXT] = Answer.json(SAID)
    with Client(server.url, max_connections=1024) as client:
        client.complete("a")


def test_fields_reach_the_server_as_they_are(server, client):
    server.answers[TEXT] = server.answers[CHAT] = Answer.json(SAID)
    client.complete(np.array([1, 2]), temperature=0, max_tokens=np.int64(8), model="m")
    assert sent(server) == {"prompt": [1, 2], "temperature": 0, "max_tokens": 8, "model": "m"}
    client.chat("Hi", cartridges=["notes", {"id": "me/run", "force_redownload": True}])
    assert sent(server) == {
        "messages": [{"role": "user", "content": "Hi"}],
        "cartridges": [
            {"id": "notes", "source": "local"},
            {"id": "me/run", "force_redownload": True},
        ],
    }
    client.complete("a", logprobs=0)
    assert sent(server) == {"prompt": "a", "logprobs": 0, "logprobs_in_fingerprint": True}
    client.chat([], ids=[1, 2], logprobs=3)
    assert sent(server) == {
        "ids": [1, 2],
        "logprobs": True,
        "top_logprobs": 3,
        "logprobs_in_fingerprint": True,
    }


def test_what_is_no_json_is_refused_before_it_is_sent(server, client):
    with pytest.raises(RequestError, match="JSON"):
        client.complete("a", stop=object())
    with pytest.raises(RequestError, match="temperature=nan"):
        client.complete("a", temperature=float("nan"))
    assert server.questions == []


def packed(array, dtype):
    return base64.b64encode(np.asarray(array, dtype).tobytes()).decode()


def test_ids_and_logprobs_come_from_the_fingerprint(server, client):
    fingerprint = {
        "completion_ids": [[5, 6, 2], [7]],
        "packed_chosen_logprobs": [packed([-1.5, -0.25, -2], "<f4"), packed([-3], "<f4")],
        "packed_topk_indices": [
            packed([[5, 1], [6, 1], [2, 9]], "<i4"),
            packed([[1, 7]], "<i4"),
        ],
        "packed_topk_logprobs": [
            packed([[-1.5, -2], [-0.25, -4], [-2, -2.5]], "<f4"),
            packed([[-0.5, -3]], "<f4"),
        ],
        "input_ids": [[1, 2]],
    }
    choices = [
        {"index": k, "message": {"content": text}, "logprobs": None, "finish_reason": "stop"}
        for k, text in enumerate(["one", None])
    ]
    server.answers[CHAT] = Answer.json(
        {
            "id": "c",
            "model": "m",
            "choices": choices,
            "system_fingerprint": json.dumps(fingerprint),
            "usage": {
                "prompt_tokens": 2,
                "completion_tokens": 4,
                "total_tokens": 6,
                "prompt_tokens_details": {"cached_tokens": 1, "cartridge_tokens": 21},
            },
        }
    )
    answer = client.chat("Hi", logprobs=2)
    assert answer.prompt_ids.tolist() == [1, 2]
    first, second = answer.choices
    assert (first.text, second.text) == ("one", "")
    assert first.token_ids.tolist() == [5, 6, 2]
    assert first.token_ids.dtype == np.int32
    assert first.logprobs.chosen.tolist() == [-1.5, -0.25, -2]
    assert first.logprobs.top_ids.tolist() == [[5, 1], [6, 1], [2, 9]]
    assert first.logprobs.top.tolist() == [[-1.5, -2], [-0.25, -4], [-2, -2.5]]
    assert second.logprobs.top_ids.tolist() == [[1, 7]]
    assert (answer.usage.cached_tokens, answer.usage.cartridge_tokens) == (1, 21)


def test_answers_of_other_servers_have_no_ids(server, client):
    choice = {
        "index": 0,
        "message": {
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [{"id": "t", "function": {"name": "f", "arguments": "{}"}}],
        },
        "logprobs": {"content": [{"token": "a", "logprob": -0.5}]},
        "finish_reason": "tool_calls",
    }
    for fingerprint in (None, "fp_44709d6fcb", "{not json"):
        server.answers[CHAT] = Answer.json(
            {"id": "c", "model": "m", "choices": [choice], "system_fingerprint": fingerprint}
        )
        answer = client.chat("Hi")
        assert answer.token_ids is None
        assert answer.text == ""
        assert answer.logprobs.chosen.tolist() == [-0.5]
        assert answer.logprobs.top.shape == (1, 0)
        assert answer.choices[0].reasoning == "hm"
        assert answer.choices[0].tool_calls[0].name == "f"


def test_other_servers_tell_ids_if_they_are_asked(server, client):
    """vLLM and SGLang, with ``return_token_ids``; in vLLM a chat's prompt is beside its choices."""
    chat = {
        "id": "c",
        "choices": [{"index": 0, "message": {"content": "x"}, "token_ids": [5, 2]}],
        "prompt_token_ids": [1, 7],
        "system_fingerprint": "vllm-0.33.0",
    }
    prompts = [[1], [2, 3]]
    text = {
        "id": "c",
        "choices": [
            {"index": k, "text": "x", "token_ids": [k], "prompt_token_ids": prompt}
            for k, prompt in enumerate(prompts)
        ],
    }
    server.answers[CHAT], server.answers[TEXT] = Answer.json(chat), Answer.json(text)
    answer = client.chat("Hi", return_token_ids=True)
    assert sent(server)["return_token_ids"] is True
    assert (answer.prompt_ids.tolist(), answer.token_ids.tolist()) == ([1, 7], [5, 2])
    assert answer.prompt_ids.dtype == answer.token_ids.dtype == np.int32
    of_sglang = {"prompt_token_ids": [1, 7], "response_token_ids": [5, 2]}
    server.answers[CHAT] = Answer.json(
        {"id": "c", "choices": [{"index": 0, "message": {"content": "x"}, **of_sglang}]}
    )
    answer = client.chat("Hi", return_token_ids=True)
    assert (answer.prompt_ids.tolist(), answer.token_ids.tolist()) == ([1, 7], [5, 2])
    answer = client.complete(["a", "b"], return_token_ids=True)
    assert [choice.prompt_ids.tolist() for choice in answer.choices] == prompts
    assert [choice.token_ids.tolist() for choice in answer.choices] == [[0], [1]]


def test_what_is_no_answer_is_an_error(server, client):
    for answer in (Answer(b"<html>"), Answer.json({"choices": []}), Answer.json({"hello": 1})):
        server.answers[TEXT] = answer
        with pytest.raises(EngineError):
            client.complete("a")


def test_many_threads_share_a_client(server, client):
    def answer(question):
        said = json.loads(question.body)["prompt"]
        return Answer.json({**SAID, "choices": [{"index": 0, "text": said}]})

    server.answers[TEXT] = answer
    with ThreadPoolExecutor(100) as threads:
        answers = list(threads.map(lambda k: client.complete(f"text {k}").text, range(500)))
    assert answers == [f"text {k}" for k in range(500)]


def test_a_closed_client_says_so(server):
    client = Client(server.url)
    server.answers["/ping"] = Answer.json({"message": "pong"})
    assert client.ping()
    client.close()
    client.close()
    with pytest.raises(EngineError, match="closed"):
        client.complete("a")
    client.close()


def test_closing_a_client_ends_the_calls_of_other_threads(server):
    release, asked = threading.Event(), threading.Event()

    def answer(question):
        asked.set()
        release.wait(30)
        return Answer.json(SAID)

    server.answers[TEXT] = answer
    client = Client(server.url)
    try:
        with ThreadPoolExecutor(1) as threads:
            call = threads.submit(client.complete, "a")
            assert asked.wait(30)
            client.close()
            with pytest.raises(EngineError, match="closed"):
                call.result(30)
    finally:
        release.set()


def test_a_file_that_is_not_there_is_named(client, tmp_path):
    with pytest.raises(RequestError, match=r"none\.pt"):
        client.cartridges.upload(tmp_path / "none.pt")


def test_importing_it_is_light():
    code = (
        "import sys, tokasaurus.client;"
        "print([m for m in ('torch', 'transformers', 'fastapi', 'openai', 'pydantic', 'zmq')"
        " if m in sys.modules])"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"
