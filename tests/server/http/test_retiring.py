"""A web server that retires, while another process accepts at the same address."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import http.client
import json
import socket
import ssl
from collections.abc import Iterator
from typing import BinaryIO

import pytest
from certificates import make_certificate
from fake_engine import CONFIG, RunningServer, with_config

from tokasaurus.launch.moving_connections import Heirs, Inheritance
from tokasaurus.protocol.messages import GenerateRequest

BODY = {"model": "m", "prompt": "hello", "max_tokens": 5}


class Retiring:
    """A server, and a second holder of its listening socket, as a new engine is one.

    With ``heirs``, the new engine takes connections, too.
    """

    def __init__(self, server: RunningServer, heirs: Heirs | None = None) -> None:
        self.server = server
        self.heirs = heirs
        self.other = server._listener.dup()
        self._retired: concurrent.futures.Future[None] | None = None

    def retire(self) -> None:
        """Returns when the server accepts no more."""
        assert self.server._loop is not None
        self._retired = asyncio.run_coroutine_threadsafe(
            self.server._server.retire(self.heirs), self.server._loop
        )
        while self.server._listener.fileno() != -1:
            self.server.settle()

    @property
    def has_retired(self) -> bool:
        assert self._retired is not None
        if self._retired.done():
            self._retired.result()
        return self._retired.done()

    def wait_retired(self) -> None:
        assert self._retired is not None
        self._retired.result(30)


@pytest.fixture
def retiring() -> Iterator[Retiring]:
    with RunningServer(CONFIG).running() as server:
        each = Retiring(server)
        with contextlib.closing(each.other):
            yield each


def connect(server: RunningServer) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.connect()
    wait_accepted(server, connection.sock)
    return connection


def wait_accepted(server: RunningServer, client: socket.socket) -> None:
    """Of the two holders of the listening socket only this one accepts connections."""
    while not server.has_connection(client):
        server.settle()


def ask(connection: http.client.HTTPConnection, **fields: object) -> http.client.HTTPResponse:
    connection.request(
        "POST",
        "/v1/completions",
        json.dumps({**BODY, **fields}),
        {"Content-Type": "application/json"},
    )
    answer = connection.getresponse()
    assert answer.status == 200
    return answer


def closes(answer: http.client.HTTPResponse) -> bool:
    return answer.getheader("Connection") == "close"


def test_each_open_connection_has_one_more_answer_and_says_that_it_closes(retiring):
    used, unused = connect(retiring.server), connect(retiring.server)
    answer = ask(used)
    answer.read()
    assert not closes(answer)
    retiring.retire()
    for connection in (used, unused):
        answer = ask(connection)
        assert json.loads(answer.read())["choices"]
        assert closes(answer)
        assert connection.sock is None or connection.sock.recv(1) == b""
    retiring.wait_retired()


def test_a_stream_that_has_begun_ends_and_its_connection_has_one_more_answer(retiring):
    connection = connect(retiring.server)
    retiring.server.engine.hold_at = 5
    stream = ask(connection, stream=True, max_tokens=60)
    assert stream.readline().startswith(b"data: ")
    retiring.retire()
    retiring.server.engine.hold_at = None
    text = stream.read()
    assert text.rstrip().endswith(b"data: [DONE]")
    assert not closes(stream)  # it could not know
    assert not retiring.has_retired
    answer = ask(connection)
    answer.read()
    assert closes(answer)
    retiring.wait_retired()


def test_an_idle_connection_closes_when_it_would_at_any_other_time(retiring):
    connection = connect(retiring.server)
    ask(connection).read()
    retiring.retire()
    retiring.server.advance(74)
    assert not retiring.has_retired
    retiring.server.advance(1.1)
    retiring.wait_retired()
    assert connection.sock is not None
    assert connection.sock.recv(1) == b""


def test_connections_that_nobody_has_accepted_wait_for_the_other_process(retiring):
    retiring.retire()
    retiring.wait_retired()
    with socket.create_connection(("127.0.0.1", retiring.server.port), timeout=30) as client:
        client.sendall(b"hello")
        accepted, _ = retiring.other.accept()
        with accepted:
            assert accepted.recv(5) == b"hello"


def test_none_of_many_connections_is_lost_in_the_moment_of_retirement(retiring):
    """Each is accepted by one of the two, and has its answer from it."""
    clients = [socket.create_connection(("127.0.0.1", retiring.server.port)) for _ in range(200)]
    retiring.retire()
    retiring.other.settimeout(1.0)
    elsewhere = set()
    with contextlib.suppress(TimeoutError), contextlib.ExitStack() as stack:
        while True:
            accepted, address = retiring.other.accept()
            stack.enter_context(accepted)
            elsewhere.add(address)
    for client in clients:
        with client:
            if client.getsockname() in elsewhere:
                continue
            client.settimeout(30)
            client.sendall(b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = client.recv(1 << 16)
            assert answer.startswith(b"HTTP/1.1 200"), answer
            assert b"connection: close" in answer.lower()
    retiring.wait_retired()


def test_connections_with_tls_retire_in_the_same_way(tmp_path):
    certificate, key = make_certificate(tmp_path)
    config = with_config(ssl_certfile=certificate, ssl_keyfile=key)
    trusted = ssl.create_default_context(cafile=certificate)
    with RunningServer(config).running() as server:
        retiring = Retiring(server)
        connection = http.client.HTTPSConnection("127.0.0.1", server.port, context=trusted)
        ask(connection).read()
        # Its handshake comes when the server accepts no more.
        late = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        server.settle()
        retiring.retire()
        with trusted.wrap_socket(late, server_hostname="127.0.0.1") as secure:
            secure.sendall(b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert secure.recv(1 << 16).startswith(b"HTTP/1.1 200")
        answer = ask(connection)
        answer.read()
        assert closes(answer)
        retiring.wait_retired()
        retiring.other.close()


@pytest.fixture
def moving(tmp_path) -> Iterator[tuple[Retiring, RunningServer]]:
    """A server that retires, and the new one, which takes its connections."""
    with RunningServer(CONFIG).running() as server, RunningServer(CONFIG).running() as new:
        made: list[Inheritance] = []
        path = str(tmp_path / "connections-2-0.sock")
        new.call(lambda: made.append(Inheritance(path, new._server.adopt)))
        each = Retiring(server, Heirs(str(tmp_path / "connections-2-*.sock")))
        with contextlib.closing(each.other):
            yield each, new
        new.call(made[0].close)


def num_requests(server: RunningServer) -> int:
    return sum(isinstance(each, GenerateRequest) for each in server.engine.received)


def test_idle_connections_move_and_their_clients_go_on(moving):
    retiring, new = moving
    used, unused = connect(retiring.server), connect(retiring.server)
    ask(used).read()
    used_address, unused_address = used.sock.getsockname(), unused.sock.getsockname()
    retiring.retire()
    retiring.wait_retired()
    for connection in (used, unused, used):
        answer = ask(connection)
        answer.read()
        assert not closes(answer)
    assert used.sock.getsockname() == used_address
    assert unused.sock.getsockname() == unused_address
    assert (num_requests(retiring.server), num_requests(new)) == (1, 3)
    new.advance(76)
    assert used.sock.recv(1) == b""  # as any other idle connection


def test_a_connection_moves_after_its_stream_and_with_what_was_sent_meanwhile(moving):
    retiring, new = moving
    connection = connect(retiring.server)
    retiring.server.engine.hold_at = 5
    stream = ask(connection, stream=True, max_tokens=60)
    retiring.retire()
    assert not retiring.has_retired
    retiring.server.engine.hold_at = None
    assert stream.read().rstrip().endswith(b"data: [DONE]")
    retiring.wait_retired()
    assert json.loads(ask(connection).read())["choices"]
    assert (num_requests(retiring.server), num_requests(new)) == (1, 1)


def test_a_connection_with_half_a_request_stays_until_it_is_answered(moving):
    retiring, new = moving
    body = json.dumps(BODY).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    clients = []
    cuts = (3, len(head) - 1, len(head), len(head) + 5)
    for cut in cuts:
        client = socket.create_connection(("127.0.0.1", retiring.server.port), timeout=30)
        client.sendall((head + body)[:cut])
        wait_accepted(retiring.server, client)
        clients.append(client)
    retiring.server.settle()
    retiring.retire()
    for client, cut in zip(clients, cuts, strict=True):
        for rest in ((head + body)[cut:], head + body):
            client.sendall(rest)
            answer = http.client.HTTPResponse(client)
            answer.begin()
            assert json.loads(answer.read())["choices"], cut
        client.close()
    retiring.wait_retired()
    assert (num_requests(retiring.server), num_requests(new)) == (len(cuts), len(cuts))


def test_a_client_that_asks_without_a_pause_is_moved_between_two_requests(moving):
    retiring, new = moving
    connection = connect(retiring.server)
    ask(connection).read()
    address = connection.sock.getsockname()
    retiring.retire()
    for _ in range(50):
        answer = ask(connection)
        answer.read()
        assert not closes(answer)
    assert connection.sock.getsockname() == address
    retiring.wait_retired()
    assert num_requests(new) > 40


def whole_request(*, chunked: bool = False) -> bytes:
    body = json.dumps(BODY).encode()
    length = b"Content-Length: %d" % len(body)
    if chunked:
        halves = (body[:9], body[9:])
        length = b"Transfer-Encoding: chunked"
        body = b"".join(b"%x\r\n%s\r\n" % (len(half), half) for half in (*halves, b""))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
    return b"\r\n".join([head, length, b"", body])


CUTS = {
    "between requests": lambda request: 0,
    "in the first line": lambda request: 7,
    "after a line of the head": lambda request: request.index(b"\r\n") + 2,
    "before the body": lambda request: request.index(b"\r\n\r\n") + 4,
    "in the body": lambda request: len(request) - 5,
}


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("cut", CUTS)
def test_a_client_that_never_waits_for_its_answers_is_moved_when_it_has_them(moving, cut, chunked):
    """It always has some requests in flight, and maybe a part of one more."""
    retiring, new = moving
    request = whole_request(chunked=chunked)
    at = CUTS[cut](request)
    with socket.create_connection(("127.0.0.1", retiring.server.port), timeout=30) as client:
        client.sendall(60 * request + request[:at])
        wait_accepted(retiring.server, client)
        retiring.retire()
        with client.makefile("rb") as answers:
            for _ in range(240):
                client.sendall(request[at:] + request[:at])
                assert json.loads(next_answer(answers))["choices"]
            assert num_requests(new) > 50
            client.sendall(request[at:])
            for _ in range(61):
                assert json.loads(next_answer(answers))["choices"]
        retiring.wait_retired()
        assert num_requests(retiring.server) + num_requests(new) == 301


def next_answer(answers: BinaryIO) -> bytes:
    """The body of the next answer of a connection."""
    assert answers.readline().startswith(b"HTTP/1.1 200")
    length = 0
    while (line := answers.readline().lower()) != b"\r\n":
        name, _, value = line.partition(b":")
        assert name != b"connection", line
        length = int(value) if name == b"content-length" else length
    return answers.read(length)


def test_without_anybody_to_take_them_connections_stay_where_they_are(tmp_path):
    with RunningServer(CONFIG).running() as server:
        retiring = Retiring(server, Heirs(str(tmp_path / "connections-2-*.sock")))
        connection = connect(server)
        ask(connection).read()
        retiring.retire()
        for _ in range(3):
            ask(connection).read()
        request = whole_request()
        with connection.sock.makefile("rb") as answers:
            connection.sock.sendall(5 * request + request[:-9])
            for _ in range(5):
                assert json.loads(next_answer(answers))["choices"]
            connection.sock.sendall(request[-9:] + request)
            for _ in range(2):
                assert json.loads(next_answer(answers))["choices"]
        connection.close()
        retiring.wait_retired()
        assert num_requests(server) == 11
        retiring.other.close()
