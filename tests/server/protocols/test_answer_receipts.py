"""Where each protocol has the receipt of an answer, whole and streamed."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import msgspec
import pytest
from fake_engine import IDENTITY, PATIENCE_S, wait_for
from rows import check_each

from tokasaurus.receipts.form import checked, found_in
from tokasaurus.receipts.once import Once
from tokasaurus.receipts.weights import RANDOM
from tokasaurus.server.operations.executor import Executor
from tokasaurus.server.protocols.table import OPERATIONS

SAMPLING = {"seed": 1, "max_tokens": 12}
USER = {"role": "user", "content": "the cat"}
REQUESTS = {
    "/v1/completions": {**SAMPLING, "prompt": ["the cat", "on a mat"], "n": 3, "logprobs": 2},
    "/v1/chat/completions": {**SAMPLING, "messages": [USER], "n": 2, "logprobs": True},
    "/generate": {**SAMPLING, "prompt": "the cat", "logprobs": 1, "n": 2},
    "/v1/responses": {"seed": 1, "input": "the cat", "max_output_tokens": 12},
}


def test_a_stream_has_the_receipt_of_the_whole_answer(server):
    def check(path):
        body = {**REQUESTS[path], "receipt": True}
        whole = server.post(path, body)
        streamed = server.post(path, {**body, "stream": True})
        receipt = checked(found_in(whole.content.decode()))
        assert checked(found_in(streamed.content.decode())) == receipt
        assert len(receipt["request"]) == (2 if path == "/v1/completions" else 1)

    check_each(REQUESTS, check)


def test_without_the_field_an_answer_has_no_receipt(server):
    """The answer with a receipt is the answer without, and the field."""

    def check(path):
        body = REQUESTS[path]
        answers = [
            server.post(path, {**body, "receipt": each}).json for each in (None, False, True)
        ]
        left_out = server.post(path, body).json
        assert "receipt" in answers[2]
        del answers[2]["receipt"]
        for each in answers:
            assert list(each) == list(left_out)

    check_each(REQUESTS, check)


def events_of(server, path, body):
    content = server.post(path, {**body, "stream": True}).content.decode()
    lines = [line.removeprefix("data: ") for line in content.splitlines() if "data: " in line]
    return [each if each == "[DONE]" else json.loads(each) for each in lines]


def test_the_last_chunk_of_a_stream_has_receipt_and_usage(server):
    for path in ("/v1/completions", "/v1/chat/completions"):
        body = {**REQUESTS[path], "receipt": True}
        *chunks, last, done = events_of(server, path, body)
        assert done == "[DONE]"
        assert last["choices"] == []
        assert "usage" not in last
        assert not any("receipt" in chunk for chunk in chunks)
        *chunks, last, done = events_of(
            server, path, {**body, "stream_options": {"include_usage": True}}
        )
        assert last["usage"]["completion_tokens"] > 0
        assert "digest" in last["receipt"]
        assert not any("receipt" in chunk for chunk in chunks)
        chunks = events_of(server, path, REQUESTS[path])
        assert chunks[-2]["choices"] != []
    *events, last, done = events_of(server, "/generate", {**REQUESTS["/generate"], "receipt": True})
    assert (done, last["usage"]["completion_tokens"]) == ("[DONE]", 24)
    assert "digest" in last["receipt"]
    assert not any("receipt" in event for event in events)


def test_openais_client_reads_a_stream_with_a_receipt(server):
    stream = server.client().chat.completions.create(
        model="m", messages=[USER], stream=True, seed=1, extra_body={"receipt": True}
    )
    *_, last = stream
    assert checked(last.receipt)["answer"][0]["choices"][0]["token_ids"]


def test_a_line_of_a_batch_may_have_a_receipt(server):
    executor = Executor(server.state, OPERATIONS)
    for path, body in REQUESTS.items():
        body = {**body, "receipt": True}
        status, content = server.on_loop(executor.answer(path, body))
        assert status == 200, content
        alone = server.post(path, body).content.decode()
        assert checked(found_in(content.decode())) == checked(found_in(alone))


@contextmanager
def worker(server, **changes):
    """The engine is like this for a while."""
    server.receipts.__init__(server.preparer.config, server.preparer.tokenizer)
    server.receipts.adopt([msgspec.structs.replace(IDENTITY, **changes)])
    try:
        yield
    finally:
        server.receipts.__init__(server.preparer.config, server.preparer.tokenizer)
        server.receipts.adopt([IDENTITY])


def test_an_engine_without_deterministic_results_refuses(server):
    with worker(server, is_deterministic=False, determinism_reason="attention=reference"):
        for path, body in REQUESTS.items():
            for stream in (False, True):
                answer = server.post(path, {**body, "receipt": True, "stream": stream})
                assert answer.status == 400
                assert answer.error["param"] == "receipt"
                assert "attention=reference" in answer.error["message"]
                assert "deterministic=T" in answer.error["message"]
    assert server.post("/v1/completions", {**REQUESTS["/v1/completions"]}).status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_other_requests_are_answered_while_a_digest_is_computed(server, stream):
    """The first receipt waits for it; nothing else does."""
    goes_on = threading.Event()

    def slow():
        assert goes_on.wait(PATIENCE_S)
        return RANDOM

    with worker(server), ThreadPoolExecutor(1) as thread:
        digest = server.receipts._weights[0] = Once(slow, "slow digest")
        body = {**REQUESTS["/v1/completions"], "stream": stream, "receipt": True}
        waiting = thread.submit(server.post, "/v1/completions", body)
        wait_for(lambda: digest._has_begun and not len(server.generations))
        assert server.client().completions.create(model="m", prompt="a", max_tokens=2).choices
        assert not waiting.done()
        goes_on.set()
        assert checked(found_in(waiting.result().content.decode()))
