"""Clients that send nothing, or hardly anything, do not hold a connection; slow ones and slow answers are let be."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from collections.abc import Iterator

import pytest
from fake_engine import RunningServer, with_config

TIMEOUT_S = 1.0  # enough for a busy machine to send a kilobyte
BODY = json.dumps({"prompt": "the cat", "max_tokens": 3}).encode()
PATIENCE_S = 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    data_dir = str(tmp_path_factory.mktemp("data"))
    config = with_config(request_read_timeout_s=TIMEOUT_S, data_dir=data_dir)
    with RunningServer(config).running() as running:
        yield running


@contextlib.contextmanager
def connected(server: RunningServer, data: bytes = b"") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
        connection.sendall(data)
        yield connection


def post(num_bytes: int, path: str = "/v1/completions", more: str = "") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"{more}Content-Length: {num_bytes}\r\n\r\n"
    ).encode()


def dribble(connection: socket.socket) -> None:
    """A byte now and then, until there is an answer."""
    deadline = time.monotonic() + PATIENCE_S
    while not select.select([connection], [], [], 0.05)[0]:
        assert time.monotonic() < deadline
        connection.sendall(b"a")


def rest_of(connection: socket.socket) -> bytes:
    """All that comes until the server hangs up."""
    data = b""
    with contextlib.suppress(ConnectionResetError):  # it may not have read everything
        while piece := connection.recv(1 << 16):
            data += piece
    return data


def check_refusal(data: bytes, status: int, said: str) -> None:
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"\r\nx-request-id: req_" in head
    assert said in json.loads(body)["error"]["message"]


def answer_to(connection: socket.socket) -> bytes:
    """One answer with its length."""
    file = connection.makefile("rb", buffering=0)  # another answer may follow
    lines = list(iter(file.readline, b"\r\n"))
    length = next(int(line.split(b":")[1]) for line in lines if b"content-length" in line)
    assert json.loads(file.read(length))
    return lines[0]


def test_who_never_says_anything(server):
    with connected(server) as connection:
        assert rest_of(connection) == b""


@pytest.mark.parametrize("first", [b"GET /ping HTTP/1.1\r\nX-Name: ", b"P", b"\r\n"])
def test_a_head_that_dribbles(server, first):
    with connected(server, first) as connection:
        dribble(connection)
        data = rest_of(connection)
        if data.startswith(b"HTTP/1.1 408"):
            check_refusal(data, 408, "head of the request did not come on within 1 s")
        else:
            assert b" 400 " in data  # by then, it was none any more


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/nothing", "/tokenize"])
def test_a_body_that_dribbles(server, path):
    with connected(server, post(100_000, path) + b"{") as connection:
        dribble(connection)
        data = rest_of(connection)
        if path == "/v1/nothing":  # answered without its body
            assert b" 404 " in data
        else:
            check_refusal(data, 408, "body of the request did not come on")
    server.check_nothing_is_left()


def test_an_upload_that_stops_leaves_nothing(server):
    head = (
        "POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n"
        "Content-Type: multipart/form-data; boundary=xyz\r\n\r\n--xyz\r\n"
        'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    )
    with connected(server, head.encode() + b"x" * 100_000) as connection:
        check_refusal(rest_of(connection), 408, "body of the request")
    deadline = time.monotonic() + PATIENCE_S
    while list(server.batches.store.path("").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_slow_body_that_comes_on(server):
    """For longer than the limit."""
    num_pieces = 30
    data = BODY + b" " * (num_pieces * 1024 - len(BODY))
    with connected(server, post(len(data))) as connection:
        for number in range(num_pieces):
            connection.sendall(data[1024 * number : 1024 * (number + 1)])
            time.sleep(2 * TIMEOUT_S / num_pieces)
        assert answer_to(connection).startswith(b"HTTP/1.1 200")


def test_an_answer_may_take_its_time(server):
    """And whatever the next request has begun with waits for it."""
    server.engine.paused = True
    with connected(server, post(len(BODY)) + BODY + b"GET /pi") as connection:
        time.sleep(1.5 * TIMEOUT_S)
        server.engine.paused = False
        assert answer_to(connection).startswith(b"HTTP/1.1 200")
        connection.sendall(b"ng HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer_to(connection).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /ping HTTP/1.1\r\nHo")
        check_refusal(rest_of(connection), 408, "head of the request")


def test_who_waits_to_be_asked_for_the_body(server):
    with connected(server, post(len(BODY), more="Expect: 100-continue\r\n")) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(BODY)
        assert answer_to(connection).startswith(b"HTTP/1.1 200")


def test_a_head_without_end(server):
    with connected(server, b"GET /ping HTTP/1.1\r\nX-Name: ") as connection:
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                connection.sendall(b"x" * 1000)
        check_refusal(rest_of(connection), 431, "may have 65536 bytes")


def test_many_requests_in_one_piece(server):
    """Large enough that they would be too much of a head."""
    request = b"GET /ping HTTP/1.1\r\nHost: x\r\nX-Name: " + b"x" * 2000 + b"\r\n\r\n"
    with connected(server, 60 * request + request[:-2]) as connection:
        for _ in range(60):
            assert answer_to(connection).startswith(b"HTTP/1.1 200")
        check_refusal(rest_of(connection), 408, "head of the request")
