"""A collector of OpenTelemetry traces in this process, which takes OTLP over HTTP."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.proto.trace.v1.trace_pb2 import Span

TIMEOUT_S = 20.0
# Of opentelemetry.proto.trace.v1, which is not always installed.
KIND_SERVER = 2
STATUS_UNSET, STATUS_ERROR = 0, 2


class Collector:
    """What has come so far.

    Attributes:
        delay_s: after which it answers.
        status: with which it answers.
        paths: of the requests.
    """

    def __init__(self) -> None:
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

        self._protocol = trace_service_pb2
        self.delay_s = 0.0
        self.status = 200
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.resources: list[dict[str, Any]] = []
        self._spans: list[Span] = []
        self._lock = threading.Lock()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.take(self.path, dict(self.headers), body)
                answer = trace_service_pb2.ExportTraceServiceResponse().SerializeToString()
                self.send_response(collector.status)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def take(self, path: str, headers: dict[str, str], body: bytes) -> None:
        time.sleep(self.delay_s)
        request = self._protocol.ExportTraceServiceRequest.FromString(body)
        with self._lock:
            self.paths.append(path)
            self.headers.append({name.lower(): value for name, value in headers.items()})
            for resource in request.resource_spans:
                self.resources.append(attributes_of(resource.resource))
                for scope in resource.scope_spans:
                    self._spans += scope.spans

    def spans(self) -> list[Span]:
        with self._lock:
            return [*self._spans]

    def traces(self) -> list[dict[str, Span]]:
        """The spans of each request by name: those of its kind, and its parts; the oldest first."""
        spans = sorted(self.spans(), key=lambda span: span.start_time_unix_nano)
        roots = [span for span in spans if span.kind == KIND_SERVER]
        return [
            {
                "request": root,
                **{span.name: span for span in spans if span.parent_span_id == root.span_id},
            }
            for root in roots
        ]

    def wait_for(self, num_requests: int) -> list[dict[str, Span]]:
        """The traces, once there are this many. A request's own span comes after its parts."""
        deadline = time.monotonic() + TIMEOUT_S
        while len(self.traces()) < num_requests:
            assert time.monotonic() < deadline, f"{len(self.traces())} traces of {num_requests}"
            time.sleep(0.02)
        return self.traces()

    @contextlib.contextmanager
    def running(self) -> Iterator[Collector]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()


def attributes_of(holder: Any) -> dict[str, Any]:
    """The attributes of a span, an event or a resource."""
    return {each.key: _value(each.value) for each in holder.attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind)
