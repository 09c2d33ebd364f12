"""Traces of a process that answers requests."""

from __future__ import annotations

import asyncio

from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.slices import ServerConfig
from tokasaurus.errors import ConfigError
from tokasaurus.observability.tracing import Tracing, is_installed
from tokasaurus.protocol.role import Role

__all__ = ["check_tracing", "close_tracing", "open_tracing"]

_CLOSE_S = 2.0  # for what is left to reach the collector


def check_tracing(config: EngineConfig) -> None:
    """Raises ConfigError if traces are wanted, and what makes them is not installed."""
    if config.otlp_endpoint is not None and not is_installed():
        raise ConfigError(
            "otlp_endpoint needs OpenTelemetry: pip install 'tokasaurus[otlp]', or leave it out"
        )


def open_tracing(config: ServerConfig, role: Role) -> Tracing | None:
    """The traces of a process; None if the user wants none."""
    return None if config.otlp_endpoint is None else Tracing(config.otlp_endpoint, str(role))


async def close_tracing(tracing: Tracing | None) -> None:
    """Sends what is left, unless that takes long."""
    if tracing is not None:
        await asyncio.to_thread(tracing.close, _CLOSE_S)
