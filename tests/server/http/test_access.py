"""Keys, limits of bodies, pages of other origins and TLS, over a real web server."""

from __future__ import annotations

import hashlib
import http.client
import logging
import socket
import ssl

import openai
import pytest
from certificates import make_certificate
from fake_engine import PATIENCE_S, RunningServer, with_config
from rows import each_row

KEYS = ("sk-first-7d1f", "sk-second-93ab")
BODY = {"prompt": "the cat", "max_tokens": 3}
ORIGIN = "https://pages.example"


def digests(*keys):
    return tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys)


@pytest.fixture(scope="module")
def locked():
    config = with_config(
        api_key_digests=digests(*KEYS), cors_origins=(ORIGIN,), max_body_bytes=2000
    )
    with RunningServer(config).running() as server:
        yield server


# --- keys --------------------------------------------------------------------------------------


@each_row("key", KEYS)
def test_every_key_is_accepted(locked, key):
    for scheme in ("Bearer", "bearer", "BEARER"):
        answer = locked.post("/v1/completions", BODY, Authorization=f"{scheme} {key}")
        assert answer.status == 200


@each_row(
    "value",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Bearer {KEYS[0]}x",
        f"Bearer {KEYS[0][:-1]}",
        f"Bearer {KEYS[0]},{KEYS[1]}",
        f"Basic {KEYS[0]}",
        KEYS[0],
        f"Bearer {digests(KEYS[0])[0]}",
    ],
)
def test_without_a_right_key_every_route_but_health_is_a_401(locked, value):
    locked.engine.received.clear()
    headers = {} if value is None else {"Authorization": value}
    for answer in (
        locked.post("/v1/completions", BODY, **headers),
        locked.get("/v1/models", **headers),
        locked.get("/version", **headers),
        locked.get("/metrics", **headers),
        locked.get("/openapi.json", **headers),
        locked.get("/v1/engine", **headers),
        locked.get("/no/such/path", **headers),
        locked.get("/health/", **headers),
    ):
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.error["type"] == "invalid_request_error"
        assert answer.error["code"] == "invalid_api_key"
        assert value is None or len(value) < 8 or value not in answer.error["message"]
    assert not locked.engine.received


def test_ping_and_health_need_no_key(locked):
    assert locked.get("/ping").status == 200
    assert locked.get("/health").status == 200


def test_the_openai_client_raises_for_a_wrong_key(locked):
    client = locked.client(api_key="sk-stolen")
    with pytest.raises(openai.AuthenticationError, match="the API key is wrong"):
        client.models.list()
    assert locked.client(api_key=KEYS[1]).models.list().data


def test_keys_are_not_logged(locked, caplog):
    with caplog.at_level(logging.DEBUG):
        locked.get("/v1/models", Authorization=f"Bearer {KEYS[0]}")
        locked.get("/v1/models", Authorization="Bearer sk-a-typo-of-a-key")
    assert "sk-" not in caplog.text


@each_row("value", ["", "Bearer ", "Bearer none", "Basic eA=="])
def test_without_keys_any_authorization_will_do(server, value):
    assert server.get("/v1/models", Authorization=value).status == 200


# --- how much ----------------------------------------------------------------------------------


def test_a_body_whose_length_is_too_large_is_refused_unread(locked):
    with socket.create_connection(("127.0.0.1", locked.port), timeout=PATIENCE_S) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS[0]}\r\n"
        connection.sendall(
            f"{head}Content-Type: application/json\r\nContent-Length: 2001\r\n\r\n".encode()
        )
        status = b""
        while not status.endswith(b"}"):
            status += connection.recv(1 << 16)
    assert status.startswith(b"HTTP/1.1 413 ")
    assert b"max_body_bytes=2000" in status


def test_a_chunked_body_that_grows_too_large_is_refused(locked):
    def ask(size):
        connection = http.client.HTTPConnection("127.0.0.1", locked.port, timeout=PATIENCE_S)
        pieces = [b'{"max_tokens": 2, "prompt": "', b"x " * (size // 2), b'"}']
        headers = {"Authorization": f"Bearer {KEYS[0]}", "Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", iter(pieces), headers, encode_chunked=True)
        answer = connection.getresponse()
        return answer.status, answer.read()

    assert ask(400)[0] == 200
    status, content = ask(4000)
    assert status == 413
    assert b"max_body_bytes=2000" in content


# --- pages of other origins --------------------------------------------------------------------


def test_a_page_of_an_allowed_origin_may_ask(locked):
    asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,content-type"
    answer = locked._ask("OPTIONS", "/v1/completions", None, asked)
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    answer = locked.post("/v1/completions", BODY, Origin=ORIGIN)
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (401, ORIGIN)
    answer = locked.post("/v1/completions", BODY, Origin=ORIGIN, Authorization=f"Bearer {KEYS[0]}")
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, ORIGIN)


def test_pages_of_other_origins_may_not_ask(locked, server):
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    answer = locked._ask("OPTIONS", "/v1/completions", None, asked)
    assert answer.status == 400
    assert "access-control-allow-origin" not in answer.headers
    answer = server.post("/v1/completions", BODY, Origin=ORIGIN)  # off by default
    assert "access-control-allow-origin" not in answer.headers


# --- TLS ---------------------------------------------------------------------------------------


def test_tls_and_keys_work_together(tmp_path):
    certificate, key = make_certificate(tmp_path)
    config = with_config(
        ssl_certfile=certificate, ssl_keyfile=key, api_key_digests=digests(KEYS[0])
    )
    with RunningServer(config).running() as server:
        trusted = ssl.create_default_context(cafile=certificate)
        connection = http.client.HTTPSConnection("127.0.0.1", server.port, context=trusted)
        for value, status in ((f"Bearer {KEYS[0]}", 200), ("Bearer no", 401)):
            connection.request("GET", "/v1/models", headers={"Authorization": value})
            answer = connection.getresponse()
            answer.read()
            assert answer.status == status
        connection.close()
        with pytest.raises((http.client.HTTPException, OSError)):
            server.get("/ping")  # without TLS
