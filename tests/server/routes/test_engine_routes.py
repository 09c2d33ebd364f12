"""Routes that describe the engine, and flushes of its prefix cache."""

from __future__ import annotations

import pytest
from fake_engine import CONFIG, RunningServer, with_config

from tokasaurus.protocol.commands import Command
from tokasaurus.version import __version__


@pytest.mark.parametrize("path", ["/flush_cache", "/reset_prefix_cache"])
def test_a_flush_reports_what_was_dropped(server, path):
    for _ in range(2):
        answer = server.post(path, b"")
        assert answer.status == 200
        assert answer.json == {"status": "ok", "flushed_pages": 3, "flushed_tokens": 48}
    asked = [each for each in server.engine.received if isinstance(each, Command)]
    assert len({each.command_id for each in asked}) == len(asked) == 2
    answer = server.get(path)  # any web page can make a browser send this
    assert (answer.status, answer.headers["allow"]) == (405, "POST")
    assert [each for each in server.engine.received if isinstance(each, Command)] == asked


def test_a_flush_ends_with_a_503_when_the_engine_dies():
    with RunningServer().running() as server:
        server.engine.send = lambda message: server.state.die("it broke")
        answer = server.post("/flush_cache", b"")
        assert answer.status == 503
        assert "it broke" in answer.error["message"]
        assert server.post("/flush_cache", b"").status == 503


def test_model_info(server):
    info = server.get("/model_info").json
    assert info["model_path"] == CONFIG.model_root
    assert info["served_model_name"] == CONFIG.model_name
    assert info["is_generation"] is True
    assert info["max_model_len"] == CONFIG.max_request_tokens
    assert info["default_sampling_params"] == {}


def test_server_info_has_no_secrets():
    key = "sk-very-secret"
    config = with_config(api_key_digests=("ab" * 32,), sampling_defaults={"temperature": 0.5})
    with RunningServer(config).running() as server:
        answer = server._ask("GET", "/server_info", None, {"Authorization": f"Bearer {key}"})
        assert answer.status == 401  # this route needs a key
    with RunningServer(with_config(sampling_defaults={"temperature": 0.5})).running() as server:
        content = server.get("/server_info").content.decode()
        info = server.get("/server_info").json
        assert server.get("/model_info").json["default_sampling_params"] == {"temperature": 0.5}
    assert "digest" not in content
    assert "key" not in content
    assert info["version"] == __version__
    assert info["status"] == "ok"
    # As sglang.bench_serving reads it.
    assert info["internal_states"][0].get("avg_spec_accept_length", None) is None
    assert info["internal_states"][0]["num_running_prompts"] == 0


def test_engine_routes_while_the_model_loads():
    with RunningServer(ready=False).running() as server:
        assert server.get("/server_info").json["status"] == "loading"
        assert server.get("/model_info").status == 503
        assert server.post("/flush_cache", b"").status == 503
        assert server.get("/tokenizer_info").status == 503
