"""Idle and dribbling clients lose their connections; slow clients and slow answers do not.

The tests move the clock of the event loop, so that no time passes while a limit does.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
from collections.abc import Iterator

import pytest
from fake_engine import PATIENCE_S, RunningServer, wait_for, with_config
from rows import each_row

LIMIT_S = 10.0
BODY = json.dumps({"prompt": "the cat", "max_tokens": 3}).encode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    data_dir = str(tmp_path_factory.mktemp("data"))
    config = with_config(request_read_timeout_s=LIMIT_S, data_dir=data_dir)
    with RunningServer(config).running() as running:
        yield running


@contextlib.contextmanager
def connected(server: RunningServer, data: bytes = b"") -> Iterator[socket.socket]:
    """A connection that the server has accepted, with some data on its way."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
        wait_for(lambda: server.has_connection(connection))
        connection.sendall(data)
        yield connection


def post(num_bytes: int, path: str = "/v1/completions", more: str = "") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"{more}Content-Length: {num_bytes}\r\n\r\n"
    ).encode()


def rest_of(server: RunningServer, connection: socket.socket, piece: bytes = b"") -> bytes:
    """Everything that arrives until the server closes the connection.

    While nothing arrives, it sends a piece and moves the clock by a tenth of the limit, repeatedly.
    """
    data = b""
    with contextlib.suppress(ConnectionError):  # the server may not have read everything
        for _ in range(1000):
            if not select.select([connection], [], [], 0.005)[0]:
                connection.sendall(piece)
                server.advance(LIMIT_S / 10)
            elif received := connection.recv(1 << 16):
                data += received
            else:
                return data
        raise AssertionError("the server waits for a hundred times the limit")
    return data


def check_refusal(data: bytes, status: int, said: str) -> None:
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"\r\nx-request-id: req_" in head
    assert said in json.loads(body)["error"]["message"]


def answer_to(connection: socket.socket) -> bytes:
    """The status line of one answer, which is read to its end."""
    file = connection.makefile("rb", buffering=0)  # another answer may follow
    lines = list(iter(file.readline, b"\r\n"))
    length = next(int(line.split(b":")[1]) for line in lines if b"content-length" in line)
    assert json.loads(file.read(length))
    return lines[0]


def test_a_silent_connection_is_closed(server):
    with connected(server) as connection:
        assert rest_of(server, connection) == b""


@each_row("first", [b"GET /ping HTTP/1.1\r\nX-Name: ", b"P", b"\r\n"])
def test_a_dribbling_head_is_refused(server, first):
    with connected(server, first) as connection:
        data = rest_of(server, connection, b"a")
        if data.startswith(b"HTTP/1.1 408"):
            check_refusal(data, 408, "head of the request did not come on within 10 s")
        else:
            assert b" 400 " in data  # with the letters, it is not a request any more


@each_row("path", ["/v1/completions", "/v1/nothing", "/tokenize"])
def test_a_dribbling_body_is_refused(server, path):
    with connected(server, post(100_000, path) + b"{") as connection:
        data = rest_of(server, connection, b"a")
        if path == "/v1/nothing":  # answered without its body
            assert b" 404 " in data
        else:
            check_refusal(data, 408, "body of the request did not come on")
    server.check_nothing_is_left()


def test_an_upload_that_stops_leaves_nothing(server):
    head = (
        "POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n"
        "Content-Type: multipart/form-data; boundary=xyz\r\n\r\n--xyz\r\n"
        'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    )
    with connected(server, head.encode() + b"x" * 100_000) as connection:
        wait_for(lambda: list(server.batches.store.path("").iterdir()))
        check_refusal(rest_of(server, connection), 408, "body of the request")
    wait_for(lambda: not list(server.batches.store.path("").iterdir()))


def test_a_slow_body_that_comes_on_is_read_for_longer_than_the_limit(server):
    num_pieces = 30
    data = BODY + b" " * (num_pieces * 1024 - len(BODY))
    with connected(server, post(len(data))) as connection:
        for number in range(num_pieces):
            connection.sendall(data[1024 * number : 1024 * (number + 1)])
            server.advance(2 * LIMIT_S / num_pieces)
        assert answer_to(connection).startswith(b"HTTP/1.1 200")


def test_an_answer_may_take_longer_than_the_limit(server):
    """The beginning of the next request waits meanwhile, and has the whole limit afterwards."""
    server.engine.reset()
    server.engine.paused = True
    with connected(server, post(len(BODY)) + BODY + b"GET /pi") as connection:
        wait_for(lambda: server.engine.requests)
        for _ in range(5):
            server.advance(LIMIT_S / 2)
        server.engine.paused = False
        assert answer_to(connection).startswith(b"HTTP/1.1 200")
        connection.sendall(b"ng HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer_to(connection).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /ping HTTP/1.1\r\nHo")
        check_refusal(rest_of(server, connection), 408, "head of the request")


def test_a_client_may_wait_for_100_continue_before_it_sends_the_body(server):
    with connected(server, post(len(BODY), more="Expect: 100-continue\r\n")) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(BODY)
        assert answer_to(connection).startswith(b"HTTP/1.1 200")


def test_an_endless_head_is_refused(server):
    with connected(server, b"GET /ping HTTP/1.1\r\nX-Name: ") as connection:
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                connection.sendall(b"x" * 1000)
        check_refusal(rest_of(server, connection), 431, "may have 65536 bytes")


def test_requests_in_one_piece_may_be_larger_than_a_head(server):
    request = b"GET /ping HTTP/1.1\r\nHost: localhost\r\nX-Name: " + b"x" * 2000 + b"\r\n\r\n"
    with connected(server, 60 * request + request[:-2]) as connection:
        for _ in range(60):
            assert answer_to(connection).startswith(b"HTTP/1.1 200")
        check_refusal(rest_of(server, connection), 408, "head of the request")
