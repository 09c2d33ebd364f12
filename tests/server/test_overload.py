"""Overload over a real web server: refusals, time limits, fair shares."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from fake_engine import RunningServer, wait_for, with_config
from load import Load, crowd

BODY = {"prompt": "the cat", "max_tokens": 400, "ignore_eos": True}


def serving(**changes):
    return RunningServer(with_config(**changes)).running()


# --- the bounded queue -------------------------------------------------------------------------


def test_a_full_queue_answers_429_with_retry_after():
    with serving(max_queued_requests=3) as server:
        server.engine.paused = True
        load = Load(server.port)
        first = load.begin("/v1/completions", {**BODY, "prompt": ["a", "b"], "user": "x"})
        wait_for(lambda: len(server.generations) == 2)
        more = load.begin("/v1/completions", {**BODY, "prompt": ["c"] * 5, "user": "x"})
        wait_for(lambda: len(server.generations) == 7)  # a large request gets in, too
        answer = server.post("/v1/completions", {**BODY, "user": "x"})
        assert answer.status == 429
        assert answer.error["code"] == "rate_limit_exceeded"
        assert "max_queued_requests=3" in answer.error["message"]
        assert int(answer.headers["retry-after"]) >= 1
        answer = server.post(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "user": "x"}
        )
        assert answer.status == 429
        with pytest.raises(openai.RateLimitError):
            server.client().completions.create(model="m", prompt="x", stream=True)
        server.engine.paused = False
        assert load.finish(first)[0] == load.finish(more)[0] == 200
        server.wait_idle()
        assert server.post("/v1/completions", BODY).status == 200


def test_a_request_that_is_refused_is_not_tokenized(monkeypatch):
    with serving(max_queued_requests=1) as server:
        server.engine.paused = True
        load = Load(server.port)
        load.begin("/v1/completions", BODY)
        wait_for(lambda: len(server.generations) == 1)
        tokenized = []
        for name in ("encode", "render_chat"):
            monkeypatch.setattr(
                server.preparer.tokenizer, name, lambda *args, **kwargs: tokenized.append(args)
            )
        chat = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 5}
        for path, body in (
            ("/v1/completions", BODY),
            ("/v1/chat/completions", chat),
            ("/v1/responses", {"input": "the cat"}),
            ("/v1/embeddings", {"input": "the cat"}),
            ("/generate", {"text": "the cat"}),
            ("/custom/synchronous-batch-completions", {"requests": [chat]}),
        ):
            assert server.post(path, body).status == 429
        assert not tokenized
        assert server.post("/v1/completions", {**BODY, "n": "x"}).error["param"] == "n"
        load.close()


def test_retry_after_follows_the_forecast():
    with serving(max_queued_requests=1) as server:
        server.engine.paused = True
        load = Load(server.port)
        load.begin("/v1/completions", {**BODY, "prompt": ["a", "b"]})
        wait_for(lambda: len(server.generations) == 2)
        for backlog_s, expected in ((200.0, 20), (3.0, 1), (1e6, 60)):
            server.call(lambda s=backlog_s: setattr(server.generations, "_backlog_eta_s", s))
            answer = server.post("/v1/completions", BODY)
            assert (answer.status, int(answer.headers["retry-after"])) == (429, expected)
        load.close()


def test_a_client_with_little_in_flight_is_admitted_to_a_full_queue():
    with serving(max_queued_requests=4) as server:
        server.engine.paused = True
        load = Load(server.port)
        load.begin("/v1/completions", {**BODY, "prompt": ["a"] * 4, "user": "greedy"})
        wait_for(lambda: len(server.generations) == 4)
        assert server.post("/v1/completions", {**BODY, "user": "greedy"}).status == 429
        for number in range(4):
            load.begin("/v1/completions", {**BODY, "user": f"u{number}"})
            wait_for(lambda n=number: len(server.generations) == 5 + n)
        answer = server.post("/v1/completions", {**BODY, "user": "u9"})
        assert answer.status == 429  # nothing gets in at twice the limit
        load.close()
        wait_for(lambda: len(server.generations) == 0)
        assert not server.generations._num_of_client


# --- how much one request may ask for ----------------------------------------------------------


def test_samples_beyond_max_n_are_refused():
    chat = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 3}
    with serving(max_n=3) as server:
        for path, body, field in (
            ("/v1/completions", {"prompt": "the cat"}, "n"),
            ("/v1/chat/completions", chat, "n"),
            ("/generate", {"prompt": "the cat"}, "n"),
            ("/generate", {"text": "the cat"}, "sampling_params.n"),
        ):
            for n, status in ((3, 200), (4, 400)):
                given = {"sampling_params": {"n": n}} if "." in field else {"n": n}
                answer = server.post(path, {**body, **given})
                assert answer.status == status
            assert answer.error["param"] == field
            assert "max_n=3" in answer.error["message"]


def test_files_beyond_max_stored_bytes_are_refused(tmp_path):
    with serving(max_stored_bytes=100, data_dir=str(tmp_path)) as server:
        client = server.client()
        first = client.files.create(file=b"x" * 60, purpose="batch")
        with pytest.raises(openai.BadRequestError, match="max_stored_bytes=100") as error:
            client.files.create(file=b"x" * 41, purpose="batch")
        assert error.value.param == "file"
        client.files.create(file=b"x" * 40, purpose="batch")
        client.files.delete(first.id)
        client.files.create(file=b"x" * 60, purpose="batch")
        assert len(list((tmp_path / "files").iterdir())) == 2


# --- time limits -------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_timeout_before_the_first_token_is_a_408(stream):
    with serving(request_timeout_s=1000.0) as server, ThreadPoolExecutor(1) as pool:
        server.engine.paused = True
        asked = pool.submit(server.post, "/v1/completions", {**BODY, "stream": stream})
        wait_for(lambda: server.engine.requests)
        server.advance(900)
        assert not server.engine.aborted
        server.advance(101)
        answer = asked.result()
        assert answer.status == 408
        assert answer.error["code"] == "request_timeout"
        assert "request_timeout_s=1000" in answer.error["message"]
        assert answer.headers["x-should-retry"] == "false"
        assert len(server.engine.aborted) == 1
        server.wait_idle()
        server.engine.paused = False
        assert server.post("/v1/completions", {**BODY, "max_tokens": 2}).status == 200


def test_a_timeout_in_the_middle_of_a_stream_is_an_error_event():
    with serving(request_timeout_s=1000.0) as server:
        server.engine.script = lambda request, index: [20] * 400
        server.engine.hold_at = 12
        load = Load(server.port)
        call = load.begin("/v1/completions", {**BODY, "stream": True})
        load.read_until(call, b"data: ")
        server.advance(1001)
        status, content = load.finish(call)
        assert status == 200
        *_, last, end = content.split(b"\n\n")
        assert end == b""
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "request_timeout"
        assert len(server.engine.aborted) == 1


def test_openais_client_does_not_send_again_what_took_too_long():
    with serving(request_timeout_s=1000.0) as server, ThreadPoolExecutor(1) as pool:
        server.engine.paused = True
        create = server.client(max_retries=3).completions.create
        asked = pool.submit(create, model="m", prompt="x")
        wait_for(lambda: server.engine.requests)
        server.advance(1001)
        with pytest.raises(openai.APIStatusError) as error:
            asked.result()
        assert error.value.status_code == 408
        assert len(server.engine.requests) == 1


# --- fair shares -------------------------------------------------------------------------------


def names_of(server, prompts):
    """The clients of the requests that reached the engine, in order."""
    return [prompts[int(request.prompt_ids[0])] for request in server.engine.requests]


def test_a_client_with_one_request_overtakes_another_with_many():
    with serving(max_seqs_per_forward=4, max_queued_requests=10_000) as server:
        server.engine.paused = True
        load = Load(server.port)
        crowd = load.begin(
            "/v1/completions",
            {"prompt": [[20]] * 400, "max_tokens": 5, "ignore_eos": True, "user": "crowd"},
        )
        wait_for(lambda: len(server.generations) == 400)
        assert len(server.engine.requests) == 16  # enough for the manager to choose from
        one = load.begin("/v1/completions", {"prompt": [21], "max_tokens": 5, "user": "one"})
        wait_for(lambda: len(server.generations) == 401)
        server.engine.paused = False
        assert load.finish(one)[0] == 200
        order = names_of(server, {20: "crowd", 21: "one"})
        assert order.index("one") <= 17
        assert load.finish(crowd)[0] == 200
        assert len(server.engine.requests) == 401


def test_users_behind_one_key_share_the_share_of_the_key():
    digest = hashlib.sha256(b"k").hexdigest()
    with serving(api_key_digests=(digest,), max_queued_requests=1) as server:
        server.engine.paused = True
        load = Load(server.port, "Authorization: Bearer k\r\n")
        load.begin("/v1/completions", {**BODY, "prompt": ["a", "b"], "user": "x"})
        wait_for(lambda: len(server.generations) == 2)
        assert set(server.generations._num_of_client) == {f"key {digest}"}
        load.close()


# --- many of all kinds -------------------------------------------------------------------------


def test_every_request_of_a_crowd_is_answered_once_and_nothing_is_left():
    """``tests/launch/test_crowd.py`` does this at full size and measures memory."""
    num_requests = 500
    with serving(max_seqs_per_forward=256, max_queued_requests=100) as server:
        server.engine.largest_step = 8
        assert crowd(server.port, 100, num_requests) == [1] * num_requests
        server.wait_idle()
        assert len(server.engine.requests) == num_requests
        assert not server.engine.aborted
        turnstile = server.generations._turnstile
        assert (turnstile.num_open, turnstile.num_held) == (0, 0)
        assert not server.generations._num_of_client
