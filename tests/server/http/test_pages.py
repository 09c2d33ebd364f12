"""Web pages elsewhere change nothing: requests that a browser sends without asking first."""

from __future__ import annotations

import hashlib

import pytest
from fake_engine import RunningServer, with_config

from tokasaurus.protocol.watching import Watch

EVIL, TRUSTED, OTHER_PORT = "https://evil.example", "https://pages.example", "http://localhost:3000"
BODY = b'{"prompt": "the cat", "max_tokens": 1}'
FORM = (
    b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\n'
    b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc\r\n--x--\r\n'
)
AS_FORM = {"Content-Type": "multipart/form-data; boundary=x"}
SAFE = ("get", "head", "options")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    config = with_config(data_dir=str(tmp_path_factory.mktemp("data")), cors_origins=(TRUSTED,))
    with RunningServer(config).running() as server:
        yield server


@pytest.fixture(scope="module")
def upload_to(tmp_path_factory):
    def upload(headers, **changes):
        config = with_config(data_dir=str(tmp_path_factory.mktemp("data")), **changes)
        with RunningServer(config).running() as server:
            answer = server._ask("POST", "/v1/files", FORM, {**AS_FORM, **headers})
            return answer, server.get("/v1/files", **headers).json

    return upload


def from_elsewhere():
    """The headers of requests that pages elsewhere send, in new and old browsers."""
    for origin in (EVIL, OTHER_PORT, "null", "http://127.0.0.1", "https://pages.example.evil.com"):
        yield {"Origin": origin}
    yield {"Origin": EVIL, "Sec-Fetch-Site": "cross-site"}
    yield {"Origin": OTHER_PORT, "Sec-Fetch-Site": "same-site"}
    yield {"Sec-Fetch-Site": "cross-site"}


def changing_routes(server):
    paths = server.get("/openapi.json").json["paths"]
    return [
        (method.upper(), path.replace("{batch_id}", "batch_1").replace("{file_id}", "file-1"))
        for path, methods in paths.items()
        for method in methods
        if method not in SAFE
    ]


def test_no_page_elsewhere_stores_cancels_flushes_or_generates(local):
    routes = changing_routes(local)
    for wanted in (
        ("POST", "/v1/completions"),
        ("POST", "/v1/files"),
        ("DELETE", "/v1/files/file-1"),
        ("POST", "/v1/batches/batch_1/cancel"),
        ("POST", "/flush_cache"),
    ):
        assert wanted in routes
    local.engine.received.clear()
    for headers in from_elsewhere():
        for method, path in routes:
            answer = local._ask(method, path, b"", headers)
            assert answer.status == 403, (headers, method, path)
            assert "cors_origins" in answer.error["message"]
            assert answer.error["code"] in ("origin_not_allowed", "admin_key_required")
        answer = local._ask("POST", "/v1/files", FORM, {**AS_FORM, **headers})
        assert (answer.status, answer.error["code"]) == (403, "origin_not_allowed"), headers
    assert not local.engine.received
    assert local.get("/v1/files").json["data"] == []


def test_programs_and_the_engines_own_pages_may_do_all_this(local):
    own = f"http://127.0.0.1:{local.port}"
    for headers in (
        {},
        {"Origin": own},
        {"Origin": own.replace("http", "https")},  # a proxy speaks TLS
        {"Origin": own, "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
        # Behind a proxy that passes its own Host on, a page of the proxy's origin.
        {"Origin": "https://chat.example", "Sec-Fetch-Site": "same-origin"},
        {"Origin": TRUSTED},
        {"Origin": TRUSTED, "Sec-Fetch-Site": "cross-site"},
    ):
        assert local.post("/v1/completions", BODY, **headers).status == 200, headers
        assert local.post("/flush_cache", b"", **headers).status == 200, headers
        answer = local._ask("POST", "/v1/files", FORM, {**AS_FORM, **headers})
        assert answer.status == 200, headers
        assert local._ask("DELETE", f"/v1/files/{answer.json['id']}", b"", headers).status == 200


def test_reading_is_not_refused_and_changes_nothing(local):
    """Without CORS headers the page does not see the answer."""
    local.engine.received.clear()
    paths = local.get("/openapi.json").json["paths"]
    for headers in from_elsewhere():
        for path in ("/health", "/v1/models", "/v1/files", "/v1/batches", "/docs"):
            answer = local.get(path, **headers)
            assert answer.status == 200, path
            assert "access-control-allow-origin" not in answer.headers
    for path, methods in paths.items():
        if "get" in methods:
            local.get(path)
    # A snapshot asks for the forecast, which changes no request.
    assert not [each for each in local.engine.received if not isinstance(each, Watch)]


def test_every_page_may_where_all_origins_are_allowed(upload_to):
    for headers in from_elsewhere():
        answer, stored = upload_to(headers, cors_origins=("*",))
        assert answer.status == 200, headers
        assert len(stored["data"]) == 1


def test_a_key_shows_that_a_page_was_trusted(upload_to):
    digest = hashlib.sha256(b"sk").hexdigest()
    for headers in from_elsewhere():
        answer, _ = upload_to(headers, api_key_digests=(digest,))
        assert answer.status == 401, headers
        headers["Authorization"] = "Bearer sk"
        answer, _ = upload_to(headers, api_key_digests=(digest,))
        assert answer.status == 200, headers


def test_engines_open_to_other_machines_refuse_pages_too(upload_to):
    answer, stored = upload_to({"Origin": EVIL}, host="0.0.0.0")
    assert answer.status == 403
    assert stored["data"] == []
