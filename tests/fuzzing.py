"""Fuzzing with the same cases at each run, and what must be true of every answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

__all__ = ["check_answer", "fuzz"]

T = TypeVar("T")

DONE = b"data: [DONE]"


def fuzz(cases: SearchStrategy[T], num_cases: int, check: Callable[[T], None]) -> None:
    """Check ``num_cases`` cases. The check itself limits how long one case may take."""

    @settings(
        max_examples=num_cases,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def run(case: T) -> None:
        check(case)

    run()


def check_answer(status: int, content_type: str, content: bytes) -> None:
    """Check for no 5xx; an error in OpenAI's shape, JSON, or a stream with a proper end."""
    assert status < 500, (status, content[:1000])
    if status >= 400:
        assert content_type == "application/json"
        _check_error(content)
    elif content_type.startswith("text/event-stream"):
        _check_stream(content)
    elif content_type == "application/json":
        assert b"\n" not in content
        json.loads(content, parse_constant=_no_constant)


def _check_error(content: bytes) -> None:
    assert b"\n" not in content
    (error,) = json.loads(content).values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert isinstance(error["param"], str | None)
    assert len(content) < 20_000, "the error repeats the request"


def _check_stream(content: bytes) -> None:
    *events, last = content.split(b"\n\n")
    assert last == b""
    assert events
    for event in events:
        fields = event.split(b"\n")  # the Responses API names its events
        assert len(fields) == 1 or (len(fields) == 2 and fields[0].startswith(b"event: "))
        assert fields[-1].startswith(b"data: ")
        if event != DONE:
            last_event = json.loads(fields[-1].removeprefix(b"data: "), parse_constant=_no_constant)
    named = last_event.get("type", "")
    assert events[-1] == DONE or named in ("response.completed", "response.incomplete"), events[-1]


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")
