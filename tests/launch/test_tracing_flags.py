"""The flag for traces, where OpenTelemetry may be missing."""

from __future__ import annotations

import pytest
from rows import each_row

from tokasaurus.config.engine import EngineConfig
from tokasaurus.errors import ConfigError
from tokasaurus.launch import tracing
from tokasaurus.launch.assemble import assemble
from tokasaurus.observability.tracing import traces_url


@each_row(
    "endpoint, url",
    [
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
        ("http://127.0.0.1:4318/", "http://127.0.0.1:4318/v1/traces"),
        ("https://collector", "https://collector/v1/traces"),
        ("https://collector/prefix/v1/traces", "https://collector/prefix/v1/traces"),
        ("127.0.0.1:4318", None),
        ("grpc://127.0.0.1:4317", None),
        ("http://", None),
        ("http://host:port", None),
        ("http://[", None),
    ],
)
def test_an_endpoint_is_a_url_of_http(endpoint, url):
    assert traces_url(endpoint) == url


def test_another_endpoint_is_an_error_that_shows_one(monkeypatch):
    monkeypatch.setattr(tracing, "is_installed", lambda: True)
    with pytest.raises(ConfigError, match=r"otlp_endpoint=host:4318: .* http://127.0.0.1:4318"):
        assemble(EngineConfig(otlp_endpoint="host:4318"))


def test_without_opentelemetry_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(tracing, "is_installed", lambda: False)
    with pytest.raises(ConfigError, match=r"pip install 'tokasaurus\[otlp\]'"):
        assemble(EngineConfig(otlp_endpoint="http://127.0.0.1:4318"))
