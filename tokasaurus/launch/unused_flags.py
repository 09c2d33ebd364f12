"""Flags of a server that have no effect on an engine without one.

They are not errors: a program, ``toka-batch`` and ``toka`` may share a configuration file.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal, TypeAlias

from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.schema import flags_of

__all__ = ["Front", "unused_flags", "warn_of_unused_flags"]

Front: TypeAlias = Literal["LLM", "AsyncLLM", "toka-batch"]
"""What runs an engine without a server."""

_OF_A_PORT = (
    "port",
    "server_processes",
    "shutdown_timeout_s",
    "restart_timeout_s",
    "max_stored_bytes",
    "ssl_certfile",
    "ssl_keyfile",
    "allowed_hosts",
    "request_read_timeout_s",
    "uvicorn_log_level",
    "local_proc_name",
    "stats_report_seconds",
    "statsd_server_url",
)
# AsyncLLM.asgi_app heeds these, since it answers to HTTP without a port.
_OF_HTTP = (
    "host",
    "unsafe_pickle_responses",
    "api_key",
    "api_key_file",
    "admin_api_key",
    "admin_api_key_file",
    "cors_origins",
    "max_queued_requests",
    "request_timeout_s",
    "max_body_bytes",
    "max_request_priority",
    "fair_share_wait_s",
)
# Lines of a batch have such bodies, too.
_OF_BODIES = ("tool_call_parser", "reasoning_parser", "trust_request_chat_template")

# Only processes of toka and toka-batch make traces.
_OF_PROGRAMS = ("otlp_endpoint",)

_UNUSED: Mapping[Front, frozenset[str]] = {
    "AsyncLLM": frozenset(_OF_A_PORT + _OF_PROGRAMS),
    "toka-batch": frozenset(_OF_A_PORT + _OF_HTTP),
    "LLM": frozenset(_OF_A_PORT + _OF_HTTP + _OF_BODIES + _OF_PROGRAMS),
}


def unused_flags(config: EngineConfig, front: Front) -> list[str]:
    """The flags that the user has set, and that have no effect there.

    Args:
        config: the user's choices.
        front: what runs the engine.
    """
    unused = set(_UNUSED[front])
    if not config.profile:  # which is written into data_dir
        unused.add("data_dir")
    return [
        flag.name
        for flag in flags_of(EngineConfig).values()
        if flag.name in unused and getattr(config, flag.name) != flag.default
    ]


def warn_of_unused_flags(config: EngineConfig, front: Front) -> None:
    """Warns the caller's caller of such flags, in one line."""
    if names := unused_flags(config, front):
        listed = f"{', '.join(names[:-1])} and {names[-1]} have" if names[1:] else f"{names[0]} has"
        warnings.warn(
            f"{listed} no effect on {front}, which has no server; toka has one",
            UserWarning,
            stacklevel=3,
        )
