"""Names in ``Host``: an engine without keys answers to those of loopback only."""

from __future__ import annotations

import hashlib
import socket

import pytest
from fake_engine import PATIENCE_S, RunningServer, with_config
from rows import each_row

BODY = {"prompt": "the cat", "max_tokens": 1}
OWN = (
    "127.0.0.1",
    "127.0.0.1:10210",
    "127.9.8.7:1",
    "127.1:10210",
    "0:10210",
    "localhost",
    "LocalHost:10210",
    "localhost.:10210",
    "app.localhost:10210",
    "ip6-localhost",
    "0.0.0.0:10210",
    "[::]:10210",
    "[::1]",
    "[::1]:10210",
    "[0:0:0:0:0:0:0:1]:10210",
    "[::ffff:127.0.0.1]:10210",
)
FOREIGN = (
    "evil.example",
    "evil.example:10210",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "evillocalhost",
    "10.1.2.3:10210",
    "[fe80::1]:10210",
    "::1",
    "[::1",
    "localhost:port",
    "localhost@evil.example",
    "evil.example#localhost",
    "localhost evil.example",
    "127.0.0.1 evil.example",
    "",
)


def serving(**changes):
    return RunningServer(with_config(**changes)).running()


def sent(server, head):
    """The whole answer to a GET with these lines after the first."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
        connection.sendall(head)
        answer = b""
        while piece := connection.recv(1 << 16):
            answer += piece
    return answer


def status(server, host, path="/v1/completions"):
    return server.post(path, BODY, Host=host).status


@each_row("host", ["127.0.0.1", "::1", "localhost"])
def test_an_engine_on_loopback_without_keys_answers_to_the_names_of_loopback_only(host):
    with serving(host=host) as server:
        for name in OWN:
            assert status(server, name) == 200, name
        server.engine.received.clear()
        for name in FOREIGN:
            # The page's origin is the same as the host, as far as the browser knows.
            answer = server.post("/v1/completions", BODY, Host=name, Origin=f"http://{name}")
            assert (answer.status, answer.error["code"]) == (421, "host_not_allowed"), name
            assert repr(name) in answer.error["message"]
            assert "allowed_hosts=" in answer.error["message"]
            assert answer.headers["x-request-id"]
        assert not server.engine.received
        for path in ("/v1/models", "/health", "/metrics", "/server_info", "/docs", "/nothing"):
            assert server.get(path, Host="evil.example").status == 421, path
        assert server.post("/pause", b"", Host="evil.example").status == 421


def test_the_configured_host_is_a_name_of_the_engine(monkeypatch):
    monkeypatch.setattr(
        "tokasaurus.server.http.access._is_loopback", lambda host: host == "workstation"
    )
    with serving(host="workstation") as server:
        assert status(server, "workstation:10210") == 200
        assert status(server, "Workstation.") == 200
        assert status(server, "workstation.evil.example") == 421


def test_allowed_hosts_are_more_names():
    with serving(allowed_hosts=("gpu.example.org", "*.lan.example", "10.1.2.3")) as server:
        good = ("gpu.example.org:80", "GPU.example.org", "a.b.lan.example", "10.1.2.3", *OWN)
        for name in good:
            assert status(server, name) == 200, name
        for name in ("evil.example", "lan.example", "x.gpu.example.org", "xlan.example"):
            assert status(server, name) == 421, name
    with serving(allowed_hosts=("*",)) as server:
        assert status(server, "evil.example") == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3"])
def test_an_engine_for_other_machines_answers_to_every_name_unless_it_has_a_list(host):
    with serving(host=host) as server:
        assert status(server, "gpu.example.org") == 200
    with serving(host=host, allowed_hosts=("gpu.example.org",)) as server:
        for name in ("gpu.example.org", host, "localhost"):
            assert status(server, name) == 200, name
        assert status(server, "evil.example") == 421


def test_keys_protect_an_engine_under_every_name():
    digest = hashlib.sha256(b"sk").hexdigest()
    with serving(api_key_digests=(digest,)) as server:
        assert status(server, "evil.example") == 401
        answer = server.post("/v1/completions", BODY, Host="a.example", Authorization="Bearer sk")
        assert answer.status == 200
    with serving(admin_key_digests=(digest,)) as server:  # requests need no key
        assert status(server, "evil.example") == 421


def test_http_1_1_needs_one_host(server):
    end = b"Connection: close\r\n\r\n"
    for lines in (b"", b"Host: localhost\r\nHost: localhost\r\n"):
        for path in (b"/ping", b"/v1/models", b"/nothing"):
            answer = sent(server, b"GET " + path + b" HTTP/1.1\r\n" + lines + end)
            assert answer.startswith(b"HTTP/1.1 400 "), (lines, path)
            assert b"one Host header" in answer
            assert b"x-request-id" in answer
    for lines in (b"", b"Host: localhost\r\n"):  # old load balancers ask so
        assert sent(server, b"GET /ping HTTP/1.0\r\n" + lines + b"\r\n").startswith(
            b"HTTP/1.1 200 "
        )
    assert sent(server, b"GET /ping HTTP/1.0\r\nHost: evil.example\r\n\r\n").startswith(
        b"HTTP/1.1 421 "
    )
