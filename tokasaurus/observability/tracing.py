"""Traces for OpenTelemetry. The only module that imports it, and only where traces are wanted.

Spans go to a collector by OTLP over HTTP, from a thread of OpenTelemetry's SDK. Nothing waits for
it: spans that find the queue full are dropped, and so are those that a collector does not take.
The SDK's environment variables say the rest: ``OTEL_TRACES_SAMPLER``, ``OTEL_SERVICE_NAME``,
``OTEL_RESOURCE_ATTRIBUTES``, ``OTEL_EXPORTER_OTLP_HEADERS``, ``OTEL_BSP_*``.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import urlsplit

from tokasaurus.version import __version__

if TYPE_CHECKING:
    from opentelemetry.trace import Span
else:
    Span = object

__all__ = ["Attributes", "Span", "Tracing", "is_installed", "traces_url"]

Attributes: TypeAlias = Mapping[str, str | int | float | bool | list[str]]

_TRACES_PATH = "/v1/traces"
_MODULES = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")


def is_installed() -> bool:
    """Whether OpenTelemetry's SDK and its exporter are there."""
    try:
        return all(importlib.util.find_spec(name) is not None for name in _MODULES)
    except ModuleNotFoundError:  # a package above
        return False


def traces_url(endpoint: str) -> str | None:
    """Where spans go: a URL without a path gets ``/v1/traces``. None if it is not a URL of HTTP."""
    try:
        parts = urlsplit(endpoint)
        has_place = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not has_place or parts.fragment:
        return None
    return endpoint if parts.path.strip("/") else endpoint.rstrip("/") + _TRACES_PATH


class Tracing:
    """Makes spans, and sends them.

    Args:
        endpoint: a URL for which ``traces_url`` has an answer.
        process: the name of this process.
    """

    def __init__(self, endpoint: str, process: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.version": __version__, "service.instance.id": process})
        if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "tokasaurus"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=traces_url(endpoint))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("tokasaurus", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def begin(
        self, name: str, headers: Mapping[str, str], attributes: Attributes, start_ns: int
    ) -> Span | None:
        """Begins the span of a request; None if the request is not sampled.

        Args:
            name: of the span.
            headers: ``traceparent`` and ``tracestate`` of the request, if it has them: the span
                belongs to that trace.
            attributes: of the span.
            start_ns: when the request came, since the epoch.
        """
        from opentelemetry.trace import SpanKind

        span = self._tracer.start_span(
            name,
            context=self._propagator.extract(headers),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=start_ns,
        )
        return span if span.is_recording() else None

    def add_part(self, span: Span, name: str, start_ns: int, end_ns: int) -> None:
        """Adds a span for a part of the time of another one."""
        from opentelemetry.trace import set_span_in_context

        part = self._tracer.start_span(name, context=set_span_in_context(span), start_time=start_ns)
        part.end(max(start_ns, end_ns))

    def end(
        self, span: Span, end_ns: int, attributes: Attributes, error: BaseException | None
    ) -> None:
        """Ends the span of a request, with the error that ended it, if one did."""
        from opentelemetry.trace import Status, StatusCode

        span.set_attributes(attributes)
        if error is not None:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(Status(StatusCode.ERROR, str(error)))
        span.end(end_ns)

    def close(self, timeout_s: float) -> None:
        """Sends what is left, unless that takes longer."""
        # A thread, since the exporter waits for the collector as long as its own timeout.
        closing = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        closing.start()
        closing.join(timeout_s)
