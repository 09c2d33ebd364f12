"""Requests as real clients send them, and answers as these clients read them."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from types import SimpleNamespace

import numpy as np
import openai
import pytest
from fake_engine import EOS_ID, TOKENIZER, RunningServer, ids_of, wait_for, with_config
from load import Load

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]


# --- lm-evaluation-harness ---------------------------------------------------------------------


@pytest.mark.parametrize("next_id", [ids_of("a")[0], EOS_ID])
def test_lm_eval_loglikelihood(server, next_id):
    """The harness cuts off the last token, whatever it is."""
    server.engine.script = lambda request, index: [next_id]
    pairs = [(ids_of("the cat"), ids_of(" sat on")), (ids_of("a"), ids_of(" mat"))]
    body = {
        "model": "m",
        "prompt": [context + continuation for context, continuation in pairs],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    choices = sorted(server.post(COMPLETIONS, body).json["choices"], key=lambda c: c["index"])
    for (context, continuation), choice in zip(pairs, choices, strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["token_logprobs"]) == len(context) + len(continuation) + 1
        chosen = logprobs["token_logprobs"][len(context) : -1]
        top = logprobs["top_logprobs"][len(context) : -1]
        assert len(chosen) == len(continuation)
        assert all(isinstance(value, float) for value in [*chosen, sum(chosen)])
        greedy = [one == max(best.values()) for one, best in zip(chosen, top, strict=True)]
        assert greedy == [token_id % 3 != 0 for token_id in continuation]


def test_lm_eval_loglikelihood_of_strings(server):
    body = {"prompt": ["the cat", "a"], "max_tokens": 1, "logprobs": 1, "echo": True}
    for choice, prompt in zip(
        server.post(COMPLETIONS, body).json["choices"], body["prompt"], strict=True
    ):
        assert len(choice["logprobs"]["token_logprobs"]) == len(TOKENIZER.encode(prompt)) + 1


def test_lm_eval_generate_until(server):
    server.engine.script = lambda request, index: [*ids_of("42\n\nQuestion: more"), EOS_ID]
    stop = ["Question:", "</s>", "<|end|>", "<|im_end|>", "\n\n\n", "Q:"]
    body = {"prompt": [ids_of("the cat")], "model": "m", "max_tokens": 256, "temperature": 0.0}
    answer = server.post(COMPLETIONS, {**body, "stop": stop, "seed": 1234}).json
    assert answer["choices"][0]["text"] == "42\n\n"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert EOS_ID in server.engine.requests[0].stop_token_ids


def test_lm_eval_starts_with_the_tokenizer_routes(server):
    """The harness asks for the end-of-sequence token and its id; it has no tokenizer of its own."""
    eos = server.get("/tokenizer_info").json["eos_token"]
    body = {"prompt": eos, "add_special_tokens": False}
    assert server.post("/tokenize", body).json["tokens"] == [EOS_ID]


# --- load generators ---------------------------------------------------------------------------

SGLANG = {"model": "m", "best_of": 1, "max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
VLLM = {"model": "m", "repetition_penalty": 1.0, "max_tokens": 8, "logprobs": None}
USAGE = {"include_usage": True}
SHAPES = {
    "sglang": (COMPLETIONS, {**SGLANG, "prompt": "the cat", "stream": True}),
    "sglang-whole": (
        COMPLETIONS,
        {**SGLANG, "prompt": "the cat", "stream": False, "lora_path": None},
    ),
    "sglang-logprobs": (
        COMPLETIONS,
        {**SGLANG, "prompt": "the cat", "stream": True, "logprobs": 0},
    ),
    "sglang-chat": (
        CHAT,
        {
            "model": "m",
            "messages": MESSAGES,
            "max_completion_tokens": 8,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": USAGE,
        },
    ),
    "vllm": (COMPLETIONS, {**VLLM, "prompt": "the cat", "stream": True, "stream_options": USAGE}),
    "vllm-ids": (
        COMPLETIONS,
        {
            **VLLM,
            "prompt": ids_of("the cat"),
            "stream": True,
            "stream_options": USAGE,
            "ignore_eos": True,
            "top_p": 0.9,
            "top_k": 10,
            "min_p": 0.0,
            "min_tokens": 0,
        },
    ),
    "vllm-chat": (
        CHAT,
        {
            "model": "m",
            "messages": PARTS,
            "max_completion_tokens": 8,
            "stream": True,
            "stream_options": USAGE,
        },
    ),
    "guidellm": (
        COMPLETIONS,
        {
            "model": "m",
            "prompt": "the cat",
            "max_tokens": 8,
            "stop": None,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {**USAGE, "continuous_usage_stats": True},
        },
    ),
    "guidellm-chat": (
        CHAT,
        {
            "model": "m",
            "messages": PARTS,
            "max_completion_tokens": 8,
            "stop": None,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {**USAGE, "continuous_usage_stats": True},
        },
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_load_generators_can_read_the_answers(server, name):
    """They read line by line: JSON after a prefix, with choices in every chunk but the usage."""
    path, body = SHAPES[name]
    answer = server.post(path, body)
    assert answer.status == 200
    lines = [line for line in answer.content.decode().split("\n") if line.strip()]
    if not body["stream"]:
        (line,) = lines
        assert json.loads(line)["usage"]["completion_tokens"] == 8
        return
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    wants_usage = "stream_options" in body
    if wants_usage:
        assert events[-1]["usage"]["completion_tokens"] == 8
        assert events.pop()["choices"] == []
    key = "text" if path == COMPLETIONS else "delta"
    assert all(key in event["choices"][0] for event in events)
    if "continuous_usage_stats" in body.get("stream_options", {}):
        assert all(event["usage"]["completion_tokens"] > 0 for event in events)


@pytest.mark.parametrize("prompt", [{"text": "the cat"}, {"input_ids": ids_of("the cat")}], ids=str)
@pytest.mark.parametrize("return_logprob", [False, True])
def test_sglangs_benchmark_reads_native_streams(server, prompt, return_logprob):
    """Each event has the whole text so far, and counts of tokens that only grow."""
    body = {
        **prompt,
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True},
        "stream": True,
        "lora_path": None,
        "return_logprob": return_logprob,
        "return_routed_experts": False,
        "logprob_start_len": -1,
        **({"top_logprobs_num": 2} if return_logprob else {}),
    }
    answer = server.post("/generate", body)
    assert answer.status == 200
    chunks = [line for line in answer.content.split(b"\n") if line.strip()]
    assert chunks.pop() == b"data: [DONE]"
    text, num_tokens = "", 0
    for chunk in chunks:
        data = json.loads(chunk.removeprefix(b"data: "))
        assert data["text"].startswith(text)
        assert data["meta_info"]["completion_tokens"] > num_tokens
        text, num_tokens = data["text"], data["meta_info"]["completion_tokens"]
    assert num_tokens == 8
    assert data["meta_info"]["prompt_tokens"] == len(server.engine.requests[0].prompt_ids)
    assert data["meta_info"]["cached_tokens"] == 0
    assert data["meta_info"]["finish_reason"] == {"type": "length", "length": 8}
    whole = server.post("/generate", {**body, "stream": False})
    assert whole.json["text"] == text
    assert b"\n" not in whole.content


@pytest.mark.parametrize("path", ["/flush_cache", "/reset_prefix_cache"])
def test_sglangs_benchmark_can_flush_and_read_the_server_state(server, path):
    """``sglang.bench_serving`` reads the first internal state, if there is an answer."""
    assert 200 <= server.post(path, b"").status < 300
    assert server.get("/model_info").status == 200
    assert server.get("/health").status == 200
    server_info = server.get("/server_info").json
    assert "decode" not in server_info
    assert server_info["internal_states"][0].get("avg_spec_accept_length") is None


def test_the_first_model_has_an_id_and_a_root(server):
    first = server.get("/v1/models").json["data"][0]
    assert first["id"]
    assert first["root"]


# --- clients of the engine's earlier versions --------------------------------------------------


def unpacked(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)


@pytest.mark.parametrize("system", ["", "be brief"])
def test_packed_logprobs_of_the_setup_guides_client(server, system):
    """Ids and logprobs are packed in the fingerprint."""
    body = {
        "model": "org/tiny-model",
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": "hi"}],
        "temperature": 0.2,
        "max_tokens": 8,
        "stop": ["FEEDBACK", "OBSERVATION"],
        "logprobs": True,
        "top_logprobs": 3,
        "logprobs_ignore_temperature": True,
        "logprobs_in_fingerprint": True,
    }
    answer = server.post(CHAT, body, Authorization="Bearer ").json
    packed = json.loads(answer["system_fingerprint"])
    (ids,) = packed["completion_ids"]
    assert len(ids) == answer["usage"]["completion_tokens"] == 8
    top_ids = unpacked(packed["packed_topk_indices"][0], "<i4").reshape(8, 3)
    top = unpacked(packed["packed_topk_logprobs"][0], "<f4").reshape(8, 3)
    assert all(token_id in row for token_id, row in zip(ids, top_ids, strict=True))
    assert (np.diff(top) <= 0).all()


def test_verl_rollout(server):
    """Ids go in, ids and float32 logprobs come out; top_p is always sent, as 1."""
    prompt = ids_of("the cat")
    body = {
        "model": "default",
        "prompt": [prompt],
        "max_tokens": 8,
        "temperature": 0.7,
        "top_p": 1.0,
        "logprobs_in_fingerprint": True,
    }
    answer = server.post(COMPLETIONS, body).json
    packed = json.loads(answer["system_fingerprint"])
    logprobs = unpacked(packed["packed_chosen_logprobs"][0], "<f4")
    assert logprobs.shape == (len(packed["completion_ids"][0]),) == (8,)
    assert server.engine.requests[0].prompt_ids.tolist() == prompt


# --- openai ------------------------------------------------------------------------------------


def test_the_async_openai_client_with_many_requests(server):
    async def ask(client, number):
        request = {"model": "", "prompt": [20 + number], "seed": number, "max_tokens": 12}
        if number % 2:
            return (await client.completions.create(**request)).choices[0].text
        chunks = await client.completions.create(**request, stream=True)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def everyone():
        async with server.async_client() as client:
            together = await asyncio.gather(*(ask(client, i) for i in range(40)))
            return together, [await ask(client, i + 1 - 2 * (i % 2)) for i in range(4)]

    together, again = asyncio.run(everyone())
    assert len(set(together)) == 40
    assert again == [together[number] for number in (1, 0, 3, 2)]


def test_the_openai_clients_stream_helper_reads_a_chat(server):
    server.engine.script = lambda request, index: [*ids_of("hello"), EOS_ID]
    with server.client().chat.completions.stream(model="m", messages=MESSAGES) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == "hello"


def test_errors_are_the_openai_clients_exceptions(server):
    client = server.client()
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="m", prompt="a", frequency_penalty=5)
    assert error.value.param == "frequency_penalty"
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=5000)
    assert error.value.code == "context_length_exceeded"
    assert "this model's maximum context length is" in str(error.value)  # litellm looks for it
    with pytest.raises(openai.NotFoundError):
        client.get("/nothing", cast_to=object)


@pytest.fixture
def naps(monkeypatch):
    """Replace the client's wait between two tries: note its seconds, and call ``naps.then``."""
    naps = SimpleNamespace(seconds=[], then=None)

    def nap(seconds):
        naps.seconds.append(seconds)
        naps.then()

    monkeypatch.setattr(openai._base_client, "time", SimpleNamespace(time=time.time, sleep=nap))
    return naps


def test_the_openai_client_retries_a_full_queue_after_the_time_it_was_told(naps):
    with RunningServer(with_config(max_queued_requests=1)).running() as server:
        server.engine.paused = True
        load = Load(server.port)
        call = load.begin(COMPLETIONS, {"prompt": ["the cat", "a"], "max_tokens": 4})
        wait_for(lambda: len(server.generations))
        server.call(lambda: setattr(server.generations, "_backlog_eta_s", 200.0))

        def go_on():
            server.engine.paused = False
            load.finish(call)
            server.wait_idle()

        naps.then = go_on
        client = server.client().with_options(max_retries=2)
        raw = client.completions.with_raw_response.create(model="m", prompt="a", max_tokens=3)
        assert naps.seconds == [20]
        assert raw.retries_taken == 1
        assert raw.headers["content-type"] == "application/json"
        assert raw.parse().usage.completion_tokens == 3


def test_the_openai_client_retries_while_the_engine_loads(naps):
    with RunningServer(ready=False).running() as server:
        naps.then = lambda: server.call(server.become_ready)
        client = server.client().with_options(max_retries=2)
        assert client.completions.create(model="m", prompt="a", max_tokens=3).usage
        assert naps.seconds == [5]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_the_openai_client_gives_up_is_aborted(server, stream):
    server.engine.paused = True
    for timeout_s in (0.1, 1, 10):  # until the request reaches the engine in time
        impatient = server.client(timeout=timeout_s)
        with pytest.raises(openai.APITimeoutError):
            impatient.completions.create(model="m", prompt="a", stream=stream)
        server.settle()
        server.wait_idle()
        if server.engine.requests:
            break
    asked = {each.request_id for each in server.engine.requests}
    assert asked
    assert server.engine.aborted == asked
