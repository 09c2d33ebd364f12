"""Which requests may control an engine over HTTP: admin keys, loopback addresses, web pages."""

from __future__ import annotations

import hashlib

import pytest
from fake_engine import RunningServer, with_config
from rows import each_row

from tokasaurus.protocol.commands import Command
from tokasaurus.server.http.access import _is_loopback

KEY, ADMIN, OTHER_ADMIN = "sk-user", "sk-admin", "sk-admin-2"
UPDATE = "/v1/weights/updates"
CONTROL = {
    *("/pause", "/resume", "/is_paused", "/sleep", "/wake_up", "/is_sleeping"),
    *("/pause_generation", "/continue_generation", "/abort_request", "/abort_requests"),
    *("/release_memory_occupation", "/resume_memory_occupation", "/weight_info"),
    *("/update_weights_from_disk", "/update_weights_from_tensor", "/update_weights_from_ipc"),
    *("/update_weights_from_distributed", "/update_weight_version", "/get_weight_version"),
    *("/init_weights_update_group", "/destroy_weights_update_group", "/get_world_size"),
    *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/start_weight_update"),
    *("/update_weights", "/finish_weight_update"),
    *(UPDATE, f"{UPDATE}/{{update_id}}", f"{UPDATE}/{{update_id}}/commit"),
    f"{UPDATE}/{{update_id}}/buckets/{{number}}",
}


def digests(*keys):
    return tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys)


def routes_of(server):
    """Every method and path of control, and of everything else."""
    paths = ask(server, "GET", "/openapi.json", ADMIN).json["paths"]
    found = [(method.upper(), path) for path, methods in paths.items() for method in methods]
    control = [each for each in found if each[1] in CONTROL]
    return control, [each for each in found if each[1] not in CONTROL]


def ask(server, method, path, key=None, **headers):
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    return server._ask(method, path, None if method == "GET" else b"", headers)


def serving(**changes):
    return RunningServer(with_config(**changes)).running()


@pytest.mark.parametrize("api_keys", [(), (KEY,)])
def test_control_needs_an_admin_key_where_there_is_one(api_keys):
    config = {
        "api_key_digests": digests(*api_keys),
        "admin_key_digests": digests(ADMIN, OTHER_ADMIN),
    }
    with serving(**config) as server:
        control, others = routes_of(server)
        assert {path for _, path in control} == CONTROL
        for method, path in control:
            for key in (None, "", "wrong", f"{ADMIN}x", digests(ADMIN)[0]):
                answer = ask(server, method, path, key)
                assert (answer.status, answer.error["code"]) == (401, "invalid_api_key"), path
                assert answer.headers["www-authenticate"] == "Bearer"
            for key in api_keys:
                answer = ask(server, method, path, key)
                assert (answer.status, answer.error["code"]) == (403, "admin_key_required"), path
        assert not server.engine.received
        for key in (ADMIN, OTHER_ADMIN):
            for method, path in control:
                assert ask(server, method, path, key).status not in (401, 403), path
        for method, path in others:
            assert ask(server, method, path, ADMIN).status not in (401, 403), path
            is_open = not api_keys or path in ("/ping", "/health")
            assert (ask(server, method, path).status == 401) != is_open, path


@each_row(
    "host, works", [("127.0.0.1", True), ("::1", True), ("0.0.0.0", False), ("10.1.2.3", False)]
)
def test_without_admin_keys_only_an_engine_on_a_loopback_address_obeys(host, works):
    with serving(host=host) as server:
        for method, path in routes_of(server)[0]:
            answer = ask(server, method, path)
            assert (answer.status == 403) != works, path
            if not works:
                assert "admin_api_key_file" in answer.error["message"]
                assert answer.error["code"] == "admin_key_required"
        assert any(isinstance(each, Command) for each in server.engine.received) == works
        assert ask(server, "POST", "/flush_cache").status == 200  # as ever


def test_without_admin_keys_the_other_keys_are_still_needed():
    with serving(api_key_digests=digests(KEY)) as server:
        assert ask(server, "POST", "/resume").status == 401
        assert ask(server, "POST", "/resume", KEY).status == 200


@each_row(
    "host, is_local",
    [
        ("127.0.0.1", True),
        ("127.9.8.7", True),
        ("::1", True),
        ("localhost", True),
        ("", False),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.1", False),
        ("no such host", False),
        ("\ud800", False),
    ],
)
def test_loopback_addresses(host, is_local):
    assert _is_loopback(host) == is_local


def test_a_web_page_cannot_control_an_engine_without_an_admin_key():
    trusted = "https://pages.example"
    with serving(cors_origins=(trusted,)) as server:
        for origin in ("https://evil.example", "null", f"http://127.0.0.1:{server.port}"):
            for method, path in routes_of(server)[0]:
                answer = ask(server, method, path, Origin=origin)
                assert (answer.status, answer.error["code"]) == (403, "admin_key_required"), path
                assert origin in answer.error["message"]
        assert not server.engine.received
        assert ask(server, "POST", "/resume", Origin=trusted).status == 200
    with serving(cors_origins=("*",)) as server:
        assert ask(server, "POST", "/resume", Origin=trusted).status == 403
    with serving(admin_key_digests=digests(ADMIN)) as server:
        assert ask(server, "POST", "/resume", ADMIN, Origin=trusted).status == 200


def test_other_paths_are_no_way_around():
    with serving(admin_key_digests=digests(ADMIN)) as server:
        for path in ("/pause/", "//pause", "/PAUSE", "/./pause", "/pause%2f", "/v1/weights"):
            assert ask(server, "POST", path).status in (401, 404, 405), path
        assert ask(server, "POST", "/%70ause").status == 401
        assert ask(server, "POST", "/pause?x=/health").status == 401
        assert ask(server, "POST", f"{UPDATE}/../updates").status == 401
        assert not server.engine.received
