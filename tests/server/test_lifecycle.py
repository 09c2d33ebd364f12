"""Clients disconnect, engines load, drain and die, and nothing is left behind."""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from fake_engine import PATIENCE_S, RunningServer, ids_of, random_ids, wait_for

LONG = {"prompt": "the cat", "max_tokens": 400, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 400, "ignore_eos": True}


@pytest.fixture
def own_server():
    """A server that the test may break."""
    with RunningServer().running() as server:
        hold(server)
        yield server


def hold(server):
    """Let every request generate three tokens and stay in flight."""
    server.engine.script = lambda request, index: ids_of("x") * request.max_tokens
    server.engine.hold_at = 3


def send_raw(server, path, body):
    """Send a request on a bare socket, which the test can close at any time."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


# --- clients that go away ----------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {**LONG, "n": 3, "prompt": ["a", "b"]}),
        ("/v1/completions", {**LONG, "stop": ["never"]}),
        ("/v1/chat/completions", CHAT),
    ],
)
def test_a_disconnect_aborts_all_prompts_of_a_request(server, path, body, stream):
    server.engine.paused = True  # nothing ends by itself
    connection = send_raw(server, path, {**body, "stream": stream})
    expected = len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1
    wait_for(lambda: len(server.engine.requests) == expected)
    server.settle()
    assert not server.engine.aborted
    connection.close()
    wait_for(lambda: len(server.generations) == 0)
    assert server.engine.aborted == {request.request_id for request in server.engine.requests}
    assert server.engine.num_running == 0


def test_a_disconnect_in_the_middle_of_a_stream_aborts_the_request(server):
    hold(server)
    connection = send_raw(server, "/v1/completions", {**LONG, "stream": True})
    received = b""
    while b"data:" not in received:
        received += connection.recv(1 << 16)
    connection.close()
    wait_for(lambda: server.engine.aborted)
    wait_for(lambda: len(server.generations) == 0)


def test_a_client_that_closes_its_stream_aborts_the_request(server):
    hold(server)
    with server.client().completions.create(model="m", **_openai(LONG), stream=True) as chunks:
        next(iter(chunks))
    wait_for(lambda: server.engine.aborted)


def test_finished_requests_are_not_aborted(server):
    for stream in (True, False):
        for _ in range(5):
            server.post("/v1/completions", {**LONG, "max_tokens": 3, "stream": stream})
            server.post("/v1/completions", {**LONG, "stop": ["a", "e", "th"], "stream": stream})
    server.wait_idle()
    assert not server.engine.aborted


def test_half_a_body_starts_nothing_and_logs_nothing(server, caplog):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head + b'Content-Length: 1000\r\n\r\n{"prompt":')
    assert server.get("/health").status == 200
    assert not server.engine.requests
    assert not caplog.records


def _openai(body):
    """A body as arguments of the openai client; fields that it does not know are in extra_body."""
    known = {name: value for name, value in body.items() if name != "ignore_eos"}
    return {**known, "extra_body": {"ignore_eos": True}}


# --- an engine that dies -----------------------------------------------------------------------


def test_the_death_of_the_engine_fails_every_request(own_server):
    client = own_server.client()

    def stream():
        chunks = client.completions.create(model="m", **_openai(LONG), stream=True)
        next(chunks)
        begun.release()
        with pytest.raises(openai.APIError, match="the worker ended: killed"):
            list(chunks)

    def whole():
        with pytest.raises(openai.InternalServerError, match="the worker ended: killed") as error:
            client.completions.create(model="m", **_openai(LONG))
        return error.value.status_code

    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(4) as pool:
        streams, wholes = [pool.submit(stream) for _ in range(2)], pool.submit(whole)
        assert all(begun.acquire(timeout=PATIENCE_S) for _ in streams)
        own_server.call(lambda: own_server.state.die("the worker ended: killed by SIGKILL"))
        for each in streams:
            each.result(PATIENCE_S)
        assert wholes.result(PATIENCE_S) == 503
    assert len(own_server.generations) == 0
    answer = own_server.get("/health")
    assert (answer.status, answer.json["status"]) == (503, "dead")
    answer = own_server.post("/v1/completions", LONG)
    assert answer.status == 503
    assert "killed by SIGKILL" in answer.error["message"]


def test_a_stream_that_broke_ends_with_an_error_event(own_server):
    connection = send_raw(own_server, "/v1/chat/completions", {**CHAT, "stream": True})
    received = connection.recv(1 << 16)
    own_server.call(lambda: own_server.state.die("the manager ended"))
    while data := connection.recv(1 << 16):
        received += data
        if data.endswith(b"0\r\n\r\n"):
            break
    events = [line for line in received.split(b"\n") if line.startswith(b"data: ")]
    error = json.loads(events[-1].removeprefix(b"data: "))["error"]
    assert "the manager ended" in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert b"[DONE]" not in received


def test_an_engine_that_dies_before_the_first_event_is_a_503(own_server):
    own_server.engine.paused = True
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(own_server.post, "/v1/completions", {**LONG, "stream": True})
        wait_for(lambda: own_server.engine.requests)
        own_server.call(lambda: own_server.state.die("the worker ended"))
        assert answer.result(PATIENCE_S).status == 503
        assert "the worker ended" in answer.result().error["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_prompt_that_the_manager_refuses_is_a_400(server, stream):
    server.engine.reject = "the prompt can never fit the cache"
    answer = server.post("/v1/completions", {**LONG, "prompt": ["a", "b"], "stream": stream})
    assert (answer.status, answer.error["param"]) == (400, "prompt")
    answer = server.post("/v1/chat/completions", {**CHAT, "stream": stream})
    assert (answer.status, answer.error["param"]) == (400, "messages")
    assert "can never fit" in answer.error["message"]


# --- an engine that loads or drains ------------------------------------------------------------


def test_a_loading_server_answers_503_until_it_is_ready():
    with RunningServer(ready=False).running() as server:
        assert server.get("/ping").json == {"message": "pong"}
        assert server.get("/version").status == 200
        answer = server.get("/health")
        assert (answer.status, answer.json["status"]) == (503, "loading")
        for answer in (
            server.post("/v1/completions", LONG),
            server.post("/v1/chat/completions", CHAT),
            server.get("/v1/models"),
            server.get("/v1/models/org/tiny-model"),
        ):
            assert answer.status == 503
            assert int(answer.headers["retry-after"]) > 0
            assert "loading" in answer.error["message"]
        server.call(server.become_ready)
        assert server.get("/health").json == {"status": "ok", "running": 0}
        assert server.post("/v1/completions", LONG).status == 200


def test_a_draining_server_finishes_requests_and_refuses_new_ones(own_server):
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(own_server.post, "/v1/completions", LONG)
        stream = pool.submit(own_server.post, "/v1/completions", {**LONG, "stream": True})
        wait_for(lambda: len(own_server.engine.requests) == 2)
        own_server.call(own_server.state.drain)
        answer = own_server.post("/v1/completions", LONG)
        assert (answer.status, answer.error["type"]) == (503, "service_unavailable")
        assert "shutting down" in answer.error["message"]
        answer = own_server.get("/health")
        assert (answer.status, answer.json["status"]) == (503, "draining")
        own_server.engine.hold_at = None
        assert whole.result(PATIENCE_S).json["usage"]["completion_tokens"] == 400
        assert stream.result(PATIENCE_S).events
    assert own_server.state.num_running == 0


def test_health_counts_prompts_in_flight(server):
    server.engine.paused = True
    connection = send_raw(server, "/v1/completions", {**LONG, "prompt": ["a", "b", "c"]})
    wait_for(lambda: server.get("/health").json["running"] == 3)
    connection.close()
    wait_for(lambda: server.get("/health").json["running"] == 0)


def test_health_names_processes_that_hang(own_server):
    generations = own_server.generations
    generations.stalled = ("worker-1-0",)
    answer = own_server.get("/health")
    assert (answer.status, answer.json) == (
        200,
        {"status": "ok", "running": 0, "stalled": ["worker-1-0"]},
    )
    assert "tokasaurus_stalled_processes 1.0" in own_server.get("/metrics").content.decode()
    generations.is_stuck = True
    answer = own_server.get("/health")
    assert (answer.status, answer.json["status"]) == (503, "stalled")
    assert own_server.get("/server_info").json["status"] == "stalled"
    own_server.call(own_server.state.drain)
    assert own_server.get("/health").json["status"] == "draining"


# --- many at once ------------------------------------------------------------------------------


def test_many_requests_at_once_get_their_own_answers(server):
    """Some of the clients disconnect; each of the others gets its own answer."""
    server.engine.script = lambda request, index: (
        ids_of("stop me here") + random_ids(request, index)
    )[: request.max_tokens]

    def ask(number):
        body = {"prompt": [20 + number], "seed": number, "max_tokens": 20 + number % 30, "n": 2}
        if number % 5 == 0:
            connection = send_raw(server, "/v1/completions", {**LONG, "stream": number % 2 == 0})
            if number % 2 == 0:
                connection.recv(1)  # the stream has begun
            connection.close()
            return None
        stop = ["here"] if number % 3 == 0 else None
        body |= {"stop": stop, "stream": number % 2 == 0}
        answer = server.post("/v1/completions", body)
        if not body["stream"]:
            return [choice["text"] for choice in answer.json["choices"]]
        texts = ["", ""]
        for event in answer.events:
            texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
        return texts

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, range(80)))
    server.wait_idle()
    for number in range(1, 80, 13):
        assert together[number] == ask(number)
    assert together[3] == ["stop me "] * 2
