"""Broken HTTP: every answer is an error of the API, with a request id."""

from __future__ import annotations

import json
import re
import socket

import pytest
from fake_engine import PATIENCE_S, RunningServer, wait_for, with_config
from rows import each_row

LIMIT = 1 << 16


@pytest.fixture(scope="module")
def batch_server(tmp_path_factory):
    config = with_config(data_dir=str(tmp_path_factory.mktemp("data")))
    with RunningServer(config).running() as server:
        yield server


def answer_to(server, data):
    """Status, headers, error. The server ends the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
        connection.sendall(data)
        received = b""
        while piece := connection.recv(1 << 16):
            received += piece
    return received


def check_error(received, status):
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), received[:200]
    headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    assert headers[b"content-type"] == b"application/json"
    assert int(headers[b"content-length"]) == len(body)
    assert headers[b"connection"] == b"close"
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return headers[b"x-request-id"], error["message"]


@each_row(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /ping HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /ping HTTP/1.1\r\nHost : localhost\r\n\r\n",
        b"GET /ping HTTP/1.1\r\n: localhost\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    ],
)
def test_malformed_http_is_answered_in_the_shape_of_the_api(server, data):
    name, message = check_error(answer_to(server, data), 400)
    assert re.fullmatch(rb"req_[0-9a-f]{32}", name)
    assert message == "this is not a valid HTTP request"


def test_a_malformed_request_keeps_the_name_that_it_gave_itself(server):
    data = b"GET /ping HTTP/1.1\r\nX-Request-Id: mine\r\nX-A: a\r\nHost : localhost\r\n\r\n"
    assert check_error(answer_to(server, data), 400)[0] == b"mine"


def head_of(num_bytes, line_bytes=None):
    """A head of this many bytes, in lines of about this many."""
    head = b"GET /ping HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    left = num_bytes - len(head) - 2
    while left:
        size = left if line_bytes is None or left < 2 * line_bytes else line_bytes
        head += b"X-A: " + b"x" * (size - 7) + b"\r\n"
        left -= size
    return head + b"\r\n"


@each_row("line_bytes", [None, 1000, 8])
def test_a_head_in_one_read_has_the_same_limit(server, line_bytes):
    small, large = head_of(LIMIT - 100, line_bytes), head_of(LIMIT + 100, line_bytes)
    assert (len(small), len(large)) == (LIMIT - 100, LIMIT + 100)
    assert answer_to(server, small).startswith(b"HTTP/1.1 200 ")
    for _ in range(3):
        _, message = check_error(answer_to(server, large), 431)
        assert "may have 65536 bytes" in message


def test_a_long_path_counts(server):
    data = b"GET /" + b"x" * (LIMIT + 100) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
    check_error(answer_to(server, data), 431)


def chunked(trailers):
    body = b'{"prompt": "x", "max_tokens": 1}'
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"%x\r\n%s\r\n0\r\n%s\r\n" % (len(body), body, trailers)
    )


def test_what_follows_a_body_neither_changes_its_head_nor_is_endless(server):
    received = answer_to(server, chunked(b"X-Request-Id: late\r\nContent-Encoding: gzip\r\n"))
    assert received.startswith(b"HTTP/1.1 200 ")
    assert b"late" not in received
    check_error(answer_to(server, chunked(b"X-A: x\r\n" * 10_000)), 431)


def test_a_stream_is_not_mixed_with_the_error_of_what_follows_it(server):
    server.engine.reset()
    server.engine.hold_at = 2
    body = b'{"prompt": "x", "max_tokens": 8, "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += b"Content-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        received = b""
        while b"data: " not in received:
            received += connection.recv(1 << 16)
        connection.sendall(b"nonsense\r\n\r\n")
        while piece := connection.recv(1 << 16):
            received += piece
    assert received.count(b"HTTP/1.1 ") == 1
    server.engine.reset()
    wait_for(lambda: not server.engine.num_running)


@each_row("num_characters, status", [(1, 200), (70, 200), (256, 200), (257, 400), (5000, 400)])
def test_long_boundaries(batch_server, num_characters, status):
    boundary = b"x" * num_characters
    form = (
        b'--@\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--@\r\n'
        b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc\r\n--@--\r\n'
    ).replace(b"@", boundary)
    media_type = f"multipart/form-data; boundary={boundary.decode()}"
    answer = batch_server._ask("POST", "/v1/files", form, {"Content-Type": media_type})
    assert answer.status == status
    if status == 400:
        assert "may have 256" in answer.error["message"]
        assert len(list(batch_server.batches.store.path("").iterdir())) < 4
