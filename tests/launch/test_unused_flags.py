"""Flags of a server that an engine without one names instead of ignoring them silently."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest

from tokasaurus import LLM, AsyncLLM
from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.schema import flags_of
from tokasaurus.errors import ModelError
from tokasaurus.launch.batch_run import main as batch_main
from tokasaurus.launch.unused_flags import Front, unused_flags

# A value of each flag that only some engines heed, none of them the default.
VALUES = {
    "port": 1,
    "server_processes": 2,
    "shutdown_timeout_s": 1.0,
    "restart_timeout_s": 1.0,
    "max_stored_bytes": 1,
    "ssl_certfile": "a",
    "ssl_keyfile": "b",
    "allowed_hosts": ("a.example.org",),
    "request_read_timeout_s": 1.0,
    "uvicorn_log_level": "debug",
    "local_proc_name": "manager",
    "stats_report_seconds": 1.0,
    "statsd_server_url": "localhost",
    "host": "0.0.0.0",
    "unsafe_pickle_responses": True,
    "api_key": ("a key",),
    "api_key_file": "c",
    "admin_api_key": ("another key",),
    "admin_api_key_file": "d",
    "cors_origins": ("*",),
    "max_queued_requests": 1,
    "request_timeout_s": 1.0,
    "max_body_bytes": 10000,
    "max_request_priority": 1,
    "fair_share_wait_s": 2.0,
    "tool_call_parser": "hermes",
    "reasoning_parser": "none",
    "trust_request_chat_template": True,
    "data_dir": "e",
}
# Flags beside those of a server that every engine heeds.
HEEDED = {"embedding_pooling", "max_n"}
SERVER_GROUPS = ("Server", "Access", "Limits on requests", "Statistics")


def test_every_flag_of_a_server_has_been_thought_of() -> None:
    """A new flag needs a value here, or a place among those that every engine heeds."""
    for flag in flags_of(EngineConfig).values():
        if flag.notes.group in SERVER_GROUPS and flag.notes.later is None:
            assert flag.name in VALUES or flag.name in HEEDED, flag.name


@pytest.mark.parametrize(
    ("front", "used"),
    [
        ("LLM", []),
        ("toka-batch", ["tool_call_parser", "reasoning_parser", "trust_request_chat_template"]),
    ],
)
def test_a_front_names_all_that_it_does_not_heed(front: Front, used: list[str]) -> None:
    config = EngineConfig.from_flags(**VALUES)
    assert set(unused_flags(config, front)) == VALUES.keys() - set(used)


def test_an_app_without_a_port_heeds_what_concerns_http() -> None:
    unused = set(unused_flags(EngineConfig.from_flags(**VALUES), "AsyncLLM"))
    assert {"port", "server_processes", "ssl_certfile", "data_dir"} <= unused
    assert unused.isdisjoint({"api_key", "cors_origins", "max_body_bytes", "tool_call_parser"})


def test_a_profile_is_written_into_data_dir() -> None:
    config = EngineConfig.from_flags(data_dir="e", profile=True, dp_size=2)
    assert unused_flags(config, "LLM") == []


def warned(make: Callable[..., object], **flags: object) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # The model is not there: what is said does not depend on it.
        with pytest.raises(ModelError):
            make("/no/such/model", **flags)
    assert {each.filename for each in caught} <= {__file__}
    return [str(each.message) for each in caught]


def test_a_program_gets_one_line_that_names_them() -> None:
    line = "port and server_processes have no effect on LLM, which has no server; toka has one"
    assert warned(LLM, server_processes=2, port=8000, page_size=32) == [line]
    line = "port has no effect on LLM, which has no server; toka has one"
    assert warned(LLM, port=8000) == [line]
    assert warned(LLM, page_size=32, max_n=5) == []
    with pytest.warns(UserWarning, match=r"^port has no effect on AsyncLLM, which"):
        AsyncLLM("/no/such/model", port=8000, api_key=("k",))


def test_a_batch_gets_a_line_for_each(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text("")
    words = ["run", str(lines), str(tmp_path / "out"), "model=/no/such/model", "port=8000"]
    assert batch_main([*words, "max_n=5", "tool_call_parser=hermes"]) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert warning == "toka-batch: warning: port has no effect without a server"
    assert "/no/such/model" in error
