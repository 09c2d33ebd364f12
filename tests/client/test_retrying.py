"""When the client sends a request again, and what it raises otherwise."""

from __future__ import annotations

import asyncio
import email.utils
import itertools
import json
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from file_server import Answer
from loop_clock import LoopClock

from tokasaurus.client import AsyncClient, Client, RetryPolicy, failures
from tokasaurus.client.failures import refusal
from tokasaurus.errors import (
    AccessDenied,
    ConfigError,
    Conflict,
    EngineError,
    EngineNotReady,
    EngineOverloaded,
    NotFound,
    RequestError,
    RequestTooLong,
    SourceUnavailable,
    StorageFull,
    TimedOut,
    Unreachable,
)

PATH = "/v1/completions"
SAID = {"id": "x", "model": "m", "choices": [{"index": 0, "text": "said", "finish_reason": "stop"}]}


def failing(status, **fields):
    headers = fields.pop("headers", {})
    return Answer.json({"error": {"message": "because", **fields}}, status, headers)


def in_turn(*answers):
    """Gives these answers one after the other, and then the last one again and again."""
    left = itertools.chain(answers, itertools.repeat(answers[-1]))
    return lambda question: next(left)


def test_what_may_help_is_repeated_with_the_same_request_id(server, client):
    for status in (408, 429, 500, 502, 503, 504):
        server.questions.clear()
        server.answers[PATH] = in_turn(failing(status), failing(status), Answer.json(SAID))
        assert client.complete("a").text == "said", status
        ids = [question.headers["x-request-id"] for question in server.questions]
        assert len(ids) == 3, status
        assert len(set(ids)) == 1, status
        assert len({question.body for question in server.questions}) == 1


def test_different_requests_have_different_ids(server, client):
    server.answers[PATH] = Answer.json(SAID)
    client.complete("a")
    client.complete("a")
    assert len({question.headers["x-request-id"] for question in server.questions}) == 2


def test_a_wrong_request_is_never_repeated(server, client):
    for status, kind in (
        (400, RequestError),
        (401, AccessDenied),
        (403, AccessDenied),
        (404, NotFound),
        (409, Conflict),
        (413, RequestError),
        (422, RequestError),
    ):
        server.questions.clear()
        server.answers[PATH] = failing(status, param="prompt", code="some_code")
        with pytest.raises(RequestError, match="because") as caught:
            client.complete("a")
        assert type(caught.value) is kind
        assert caught.value.field == "prompt"
        assert (caught.value.answer.status, caught.value.answer.code) == (status, "some_code")
        assert len(server.questions) == 1, status


def test_what_retries_do_not_help_against(server, client):
    for status, code, kind in (
        (408, None, TimedOut),
        (429, None, EngineOverloaded),
        (500, None, EngineError),
        (502, "source_unavailable", SourceUnavailable),
        (502, None, EngineError),
        (503, None, EngineNotReady),
        (504, None, TimedOut),
        (507, None, StorageFull),
    ):
        server.questions.clear()
        server.answers[PATH] = failing(status, code=code)
        with pytest.raises(EngineError, match="because") as caught:
            client.complete("a")
        assert type(caught.value) is kind, status
        assert len(server.questions) == 4, status  # an attempt and three retries


def test_a_prompt_that_is_too_long_has_its_own_error(server, client):
    server.answers[PATH] = failing(400, code="context_length_exceeded")
    with pytest.raises(RequestTooLong):
        client.complete("a")


def test_the_engine_can_forbid_retries(server, client):
    server.answers[PATH] = failing(504, headers={"X-Should-Retry": "false"})
    with pytest.raises(TimedOut):
        client.complete("a")
    assert len(server.questions) == 1


def test_an_answer_that_breaks_off_is_asked_for_again(server, client):
    whole = Answer.json(SAID)
    broken = Answer(whole.body[:10], length=len(whole.body))
    server.answers[PATH] = in_turn(broken, whole)
    assert client.complete("a").text == "said"
    assert len(server.questions) == 2


def test_an_answer_that_does_not_come_in_time_is_asked_for_again(server, client):
    release, clock = threading.Event(), LoopClock(client._loop._begun())

    def slow(question):
        if len(server.questions) == 1:
            clock.advance(61)
            release.wait(30)
        return Answer.json(SAID)

    server.answers[PATH] = slow
    try:
        assert client.complete("a", timeout_s=60).text == "said"
        assert len(server.questions) == 2
    finally:
        release.set()


def test_an_answer_that_never_comes_in_time_is_a_timeout(server):
    release = threading.Event()

    def slow(question):
        release.wait(30)
        return Answer.json(SAID)

    server.answers[PATH] = slow
    try:
        with (
            Client(server.url, retry=RetryPolicy(max_retries=0)) as client,
            pytest.raises(TimedOut, match=r"timeout_s=0\.1"),
        ):
            client.complete("a", timeout_s=0.1)
    finally:
        release.set()


def test_an_engine_that_starts_late_is_reached(server):
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = reserved.getsockname()
        several_are_refused = threading.Event()

        class Endless(RetryPolicy):
            def delay_s(self, retry, retry_after_s=None):
                if retry == 3:
                    several_are_refused.set()
                return super().delay_s(retry, retry_after_s)

        policy = Endless(max_retries=1 << 30, starting_delay_s=0.05, backoff_factor=1)
        with Client(f"http://127.0.0.1:{address[1]}", retry=policy) as client:
            answers = []
            thread = threading.Thread(target=lambda: answers.append(client.complete("a").text))
            thread.start()
            assert several_are_refused.wait(60)
            reserved.listen()
            connection, _ = reserved.accept()
            with connection:
                connection.recv(65536)
                body = Answer.json(SAID).body
                head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n"
                connection.sendall(head.encode() + body)
                thread.join(60)
    assert answers == ["said"]


def test_nothing_at_the_address(monkeypatch):
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        monkeypatch.setenv("TOKASAURUS_BASE_URL", f"http://127.0.0.1:{reserved.getsockname()[1]}")
        with Client(retry=RetryPolicy(max_retries=1, starting_delay_s=0.001)) as client:
            assert not client.ping()
            with pytest.raises(Unreachable, match="start an engine with `toka`"):
                client.complete("a")
            with pytest.raises(TimedOut, match="nothing answers"):
                client.wait_until_ready(0.1)


def test_a_pause_grows_up_to_its_limit_and_is_never_the_same():
    policy = RetryPolicy(starting_delay_s=1, backoff_factor=2, max_delay_s=10)
    for retry, longest in ((1, 1), (2, 2), (3, 4), (4, 8), (5, 10), (5000, 10)):
        delays = [policy.delay_s(retry) for _ in range(50)]
        assert longest / 2 <= min(delays)
        assert max(delays) <= longest
        assert len(set(delays)) > 25


def test_retry_after_is_the_least_that_is_waited(monkeypatch):
    now = 1_800_000_000
    monkeypatch.setattr(failures, "time", SimpleNamespace(time=lambda: now))
    policy = RetryPolicy(starting_delay_s=1)
    assert 7.5 <= policy.delay_s(1, retry_after_s=7) <= 8
    for value, least, most in (
        ("7", 7, 7),
        ("0.25", 0.25, 0.25),
        (email.utils.formatdate(now + 60), 60, 60),
        (email.utils.formatdate(now - 60), 0, 0),
        ("-3", 0, 0),
        ("inf", 3600, 3600),
        ("nan", 0, 3600),
    ):
        waits = refusal(429, {"retry-after": value}, b"").retry_after_s
        assert least <= waits <= most, value
    assert refusal(429, {"retry-after": "soon"}, b"").retry_after_s is None


def test_retry_after_is_honoured(server):
    times = []

    def answer(question):
        times.append(time.monotonic())
        if len(times) == 1:
            return failing(429, headers={"Retry-After": "0.3"})
        return Answer.json(SAID)

    server.answers[PATH] = answer
    with Client(server.url, retry=RetryPolicy(starting_delay_s=0)) as client:
        client.complete("a")
    assert times[1] - times[0] >= 0.3


def test_wrong_numbers_are_refused():
    for wrong in (
        {"max_retries": -1},
        {"starting_delay_s": -1.0},
        {"backoff_factor": 0.5},
        {"max_delay_s": float("nan")},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            RetryPolicy(**wrong)


def test_a_batch_is_started_once_though_its_answer_is_lost(server, client):
    """The first attempt starts the batch, and then the connection breaks."""
    batches = []

    def start(question):
        if question.method == "GET":
            return Answer.json({"data": batches, "has_more": False})
        asked = json.loads(question.body)
        batches.append(
            {"id": f"batch_{len(batches)}", "status": "in_progress", "endpoint": PATH, **asked}
        )
        return Answer(b"{", length=100)

    server.answers["/v1/batches"] = start
    batch = client.batches.start("file-1", endpoint=PATH, metadata={"run": "7"})
    assert batch.id == "batch_0"
    assert len(batches) == 1
    assert batch.raw["metadata"]["run"] == "7"
    client.batches.start("file-1", endpoint=PATH, metadata={"run": "7"})  # another, which is wanted
    assert len(batches) == 2


def test_a_file_whose_deletion_was_not_answered_is_deleted(server, client):
    """The second attempt would find nothing to delete."""
    files = {"file-1"}

    def answer(question):
        path = question.path
        if path.rpartition("/")[2] not in files:
            return failing(404)
        if question.method == "GET":
            return Answer.json({"id": "file-1", "filename": "", "bytes": 0, "purpose": "batch"})
        files.clear()
        return Answer(b"", length=100)

    server.answers["/v1/files/file-1"] = answer
    client.files.delete("file-1")
    assert files == set()
    with pytest.raises(NotFound):
        client.files.delete("file-1")


def test_a_stream_is_repeated_before_it_begins_and_never_after(server, client):
    event = b'data: {"choices": [{"index": 0, "text": "a", "finish_reason": null}]}\n\n'
    server.answers[PATH] = in_turn(
        failing(503), Answer(event + b"data: [DONE]\n\n"), Answer(event, length=1000)
    )
    assert [piece.text for piece in client.stream_complete("x")] == ["a"]
    assert len(server.questions) == 2
    pieces = []
    with pytest.raises(Unreachable):
        pieces.extend(piece.text for piece in client.stream_complete("x"))
    assert len(server.questions) == 3


def test_a_stream_without_its_end_has_failed(server, client):
    event = b'data: {"choices": [{"index": 0, "text": "a", "finish_reason": null}]}\n\n'
    server.answers[PATH] = Answer(event)
    with pytest.raises(Unreachable, match="broke off"):
        list(client.stream_complete("x"))


def test_an_error_in_a_stream_is_raised(server, client):
    told = b'data: {"error": {"message": "it died", "type": "service_unavailable"}}\n\n'
    server.answers[PATH] = Answer(told)
    with pytest.raises(EngineNotReady, match="it died"):
        list(client.stream_complete("x"))


def test_time_spent_waiting_for_a_turn_is_no_time_of_the_request(server):
    """Four requests, one connection: each has its whole time after those before it."""

    async def all_of_them():
        clock = LoopClock(asyncio.get_running_loop())

        def answer(question):
            clock.advance(40)
            return Answer.json(SAID)

        server.answers[PATH] = answer
        async with AsyncClient(
            server.url, max_connections=1, timeout_s=60, retry=RetryPolicy(max_retries=0)
        ) as client:
            return await asyncio.gather(*(client.complete("a") for _ in range(4)))

    assert [each.text for each in asyncio.run(all_of_them())] == ["said"] * 4
