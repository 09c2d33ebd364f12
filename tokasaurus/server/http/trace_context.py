"""The client's trace that a request belongs to, as W3C's Trace Context puts it into headers."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import Scope

__all__ = ["trace_headers"]

_NAMES = (b"traceparent", b"tracestate")


def trace_headers(scope: Scope) -> Mapping[str, str]:
    """The headers ``traceparent`` and ``tracestate`` of a request, as far as it has them."""
    return {
        name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _NAMES
    }
