"""Small routes, the shape of errors, and which bodies are read."""

from __future__ import annotations

import gzip
import json

import pytest
from fake_engine import CONFIG, RunningServer, wait_for
from rows import each_row

import tokasaurus

BODY = {"prompt": "the cat"}


def test_ping_and_version(server):
    assert server.get("/ping").json == {"message": "pong"}
    assert server.get("/version").json == {"version": tokasaurus.__version__}


def test_the_model_is_listed_and_retrieved(server):
    listed = server.get("/v1/models").json
    (model,) = listed["data"]
    assert listed["object"] == "list"
    assert (model["id"], model["root"]) == (CONFIG.model_name, CONFIG.model_root)
    assert (model["object"], model["owned_by"]) == ("model", "tokasaurus")
    assert server.get(f"/v1/models/{CONFIG.model_name}").json == model
    client = server.client()
    assert [each.id for each in client.models.list()] == [CONFIG.model_name]
    assert client.models.retrieve(CONFIG.model_name).id == CONFIG.model_name


def test_a_model_is_found_by_every_name_that_requests_may_use(server):
    model = server.get(f"/v1/models/{CONFIG.model_name}").json
    for name in ("default", "another/model", "gpt-4o"):
        assert server.get(f"/v1/models/{name}").json == {**model, "id": name}
        answer = server.post("/v1/completions", {"prompt": "a", "max_tokens": 1, "model": name})
        assert answer.json["model"] == name
    assert server.client().models.retrieve("default").id == "default"


@pytest.mark.parametrize("ready", [True, False])
def test_head_has_the_status_and_headers_of_get_without_a_body(ready):
    with RunningServer(ready=ready).running() as server:
        for path in (
            "/ping",
            "/health",
            "/version",
            "/v1/models",
            "/v1/models/default",
            "/model_info",
            "/server_info",
        ):
            get, head = (server._ask(method, path, None, {}) for method in ("GET", "HEAD"))
            assert (head.status, head.content) == (get.status, b""), path
            assert head.headers["content-type"] == get.headers["content-type"], path
        assert server._ask("HEAD", "/v1/nothing", None, {}).status == 404
        assert server._ask("HEAD", "/v1/completions", None, {}).status == 405
        assert server._ask("HEAD", "/flush_cache", None, {}).status == 405


@each_row(
    "method, path, status",
    [
        ("GET", "/page", 404),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/completions/", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("DELETE", "/v1/chat/completions", 405),
    ],
)
def test_unknown_routes_and_methods_are_refused(server, method, path, status):
    answer = server._ask(method, path, None, {})
    assert answer.status == status
    assert answer.error["type"] == "invalid_request_error"
    assert path in answer.error["message"]
    assert ("allow" in answer.headers) == (status == 405)


@each_row(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b"null",
        b'"text"',
        b'{"prompt": NaN}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"a": ' + b"[" * 100_000,
    ],
)
def test_a_body_that_is_not_a_json_object_is_refused(server, body):
    answer = server.post("/v1/completions", body)
    assert answer.status == 400
    assert "body" in answer.error["message"]


@each_row("media_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_only_a_json_content_type_is_read(server, media_type):
    """A page in a browser may send any other type to a local server without asking."""
    server.engine.received.clear()
    answer = server._ask(
        "POST", "/v1/completions", json.dumps(BODY).encode(), {"Content-Type": media_type}
    )
    assert answer.status == 415
    assert "application/json" in answer.error["message"]
    assert not server.engine.requests


def test_a_body_without_a_content_type_is_refused(server):
    answer = server._ask("POST", "/v1/completions", json.dumps(BODY).encode(), {})
    assert answer.status == 415
    assert "it had none" in answer.error["message"]


def test_a_compressed_body_is_refused(server):
    body = gzip.compress(json.dumps(BODY).encode())
    answer = server.post("/v1/completions", body, **{"Content-Encoding": "gzip"})
    assert answer.status == 415
    assert "Content-Encoding: gzip" in answer.error["message"]
    assert server.post("/v1/completions", BODY, **{"Content-Encoding": "identity"}).status == 200


@each_row("media_type", ["application/json; charset=utf-8", "Application/JSON"])
def test_json_content_types_may_have_parameters_and_capitals(server, media_type):
    assert server.post("/v1/completions", BODY, **{"Content-Type": media_type}).status == 200


def test_an_internal_error_is_a_500_without_details(server, monkeypatch, caplog):
    def broken(*_, **__):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(server.preparer, "prepare", broken)
    answer = server.post("/v1/completions", BODY)
    assert answer.status == 500
    assert "secret" not in answer.error["message"]
    wait_for(lambda: "secret" in caplog.text)  # the operator learns it


@each_row("authorization", ["", "Bearer ", "Bearer anything"])
def test_unknown_headers_are_ignored(server, authorization):
    headers = {"Authorization": authorization, "x-request-id": "5", "x-anything": "else"}
    assert server.post("/v1/completions", BODY, **headers).status == 200


def test_the_openapi_document_describes_the_bodies(server):
    document = json.loads(server.get("/openapi.json").content)
    for path, name in (
        ("/v1/completions", "CompletionRequest"),
        ("/v1/chat/completions", "ChatRequest"),
    ):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert body["schema"] == {"$ref": f"#/components/schemas/{name}"}
        assert "temperature" in document["components"]["schemas"][name]["properties"]
    references = json.dumps(document).split('"#/components/schemas/')[1:]
    assert {each.split('"')[0] for each in references} <= set(document["components"]["schemas"])
