"""``X-Request-Id``: every answer has one; it is the client's own if that is well-formed."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from fake_engine import RunningServer, wait_for, with_config
from rows import each_row

BODY = {"prompt": "the cat", "max_tokens": 3}
OURS = re.compile(r"req_[0-9a-f]{32}")
ORIGIN = "https://example.org"


@pytest.fixture(scope="module")
def picky() -> Iterator[RunningServer]:
    with RunningServer(with_config(cors_origins=(ORIGIN,))).running() as server:
        yield server


def test_the_openai_client_finds_the_request_id(server):
    client = server.client()
    answers = [client.completions.create(model="m", **BODY) for _ in range(2)]
    names = {answer._request_id for answer in answers}
    assert len(names) == 2
    assert all(OURS.fullmatch(name) for name in names)
    own = {"X-Request-Id": "mine/7"}
    answer = client.completions.create(model="m", **BODY, extra_headers=own)
    assert answer._request_id == "mine/7"


@each_row(
    "method, path, body, status",
    [
        ("POST", "/v1/completions", BODY, 200),
        ("POST", "/v1/completions", {**BODY, "stream": True}, 200),
        ("POST", "/v1/completions", {}, 400),
        ("POST", "/v1/completions", {"prompt": "a" * (2 << 20)}, 413),
        ("POST", "/tokenize", {"prompt": "a"}, 200),
        ("POST", "/v1/nothing", {}, 404),
        ("GET", "/v1/completions", None, 405),
        ("GET", "/ping", None, 200),
        ("GET", "/openapi.json", None, 200),
    ],
)
def test_every_answer_has_a_request_id(server, method, path, body, status):
    for given in (None, "abc"):
        headers = {} if given is None else {"X-Request-Id": given}
        if method == "POST":
            answer = server.post(path, body, **headers)
        else:
            answer = server.get(path, **headers)
        assert answer.status == status
        name = answer.headers["x-request-id"]
        assert name == given or (given is None and OURS.fullmatch(name))


@each_row("given", ["", "a b", "x" * 129, "é", "a\tb"])
def test_malformed_request_ids_are_replaced(server, given):
    answer = server.post("/v1/completions", BODY, **{"X-Request-Id": given})
    assert OURS.fullmatch(answer.headers["x-request-id"])


def test_internal_errors_are_logged_with_the_request_id(server, monkeypatch, caplog):
    def broken(*_, **__):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(server.preparer, "prepare", broken)  # on a direct route
    monkeypatch.setattr(server.state, "check", broken)  # and on others
    for path, ask in (
        ("/v1/completions", server.post),
        ("/v1/models", lambda path, _, **more: server.get(path, **more)),
    ):
        answer = ask(path, BODY, **{"X-Request-Id": f"mine:{path}"})
        assert (answer.status, answer.headers["x-request-id"]) == (500, f"mine:{path}")
        wait_for(lambda path=path: f"request mine:{path}" in caplog.text)


def test_pages_of_other_origins_may_read_the_request_id(picky):
    answer = picky.post("/v1/completions", BODY, Origin=ORIGIN)
    assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()
