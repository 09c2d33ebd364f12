"""Traces: lines of JSON, and the requests that they become."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest

from tokasaurus.errors import ConfigError
from tokasaurus.planner.simulated_device import STOP_ID
from tokasaurus.planner.trace import (
    TraceRequest,
    generate_request,
    max_request_tokens,
    read_trace,
    trace_lengths,
    write_trace,
)
from tokasaurus.planner.workloads import WORKLOADS

GOOD = '{"arrival_s": 1, "prompt_tokens": 9, "output_tokens": [3], "max_tokens": 4}'


def line(**changes):
    fields = {"arrival_s": 0.0, "prompt_tokens": 9, "output_tokens": (3,), "max_tokens": 4}
    return TraceRequest(**{**fields, **changes})


def read(text):
    return read_trace(io.BytesIO(text.encode()))


def test_a_written_trace_is_read_back():
    trace = [
        line(output_tokens=(3, 4), first_k=1, num_logprobs=2),
        line(arrival_s=0.5, prefix_id=3, prefix_tokens=5, priority=-1, stop_strings=True),
    ]
    file = io.BytesIO()
    write_trace(trace, file)
    assert file.getvalue().count(b"\n") == 2
    assert read_trace(io.BytesIO(file.getvalue())) == trace


def test_blank_lines_do_not_count():
    assert read(f"\n{GOOD}\n\n") == [line(arrival_s=1.0)]


WRONG = {
    "": "the trace is empty",
    f"{GOOD}\nhello": "line 2 of the trace",
    GOOD.replace('"max_tokens"', '"max_token"'): "line 1.*max_token",
    GOOD.replace("9", '"nine"'): r"line 1.*prompt_tokens",
    GOOD.replace("9", "0"): "line 1.*prompt_tokens must be at least 1",
    GOOD.replace("[3]", "[]"): "line 1.*output_tokens",
    GOOD.replace("[3]", "[5]"): "line 1.*output_tokens must be from 1 to max_tokens",
    GOOD.replace("1,", "-1,", 1): "line 1.*arrival_s",
    GOOD.replace("}", ', "prefix_tokens": 3}'): "line 1.*prefix_id",
    GOOD.replace("}", ', "prefix_id": 0, "prefix_tokens": 10}'): "line 1.*prefix_tokens",
    GOOD.replace("}", ', "first_k": 2}'): "line 1.*first_k",
    GOOD.replace("}", ', "num_logprobs": -2}'): "line 1.*num_logprobs",
    f"{GOOD}\n{GOOD.replace('1,', '0,', 1)}": "line 2.*arrives before",
}


def test_the_error_of_a_wrong_line_names_the_line_and_the_field():
    for text, complaint in WRONG.items():
        assert re.search(complaint, error_of(text)), text


def error_of(text):
    try:
        return f"read as {read(text)}"
    except ConfigError as error:
        return str(error)


def test_prompts_share_the_prefix_that_the_trace_names():
    first, second, other = (
        generate_request(line(prompt_tokens=40, prefix_id=prefix_id, prefix_tokens=25), number)
        for number, prefix_id in enumerate((3, 3, 4))
    )
    is_equal = first.prompt_ids == second.prompt_ids
    assert is_equal[:25].all()
    assert not is_equal[25:].any()
    assert not (first.prompt_ids == other.prompt_ids).all()
    assert STOP_ID not in first.prompt_ids


def test_a_request_has_the_fields_of_its_line():
    request = generate_request(
        line(output_tokens=(1, 2), priority=3, first_k=1, num_logprobs=4, stop_strings=True), 17
    )
    assert (request.request_id, request.n, request.max_tokens) == (17, 2, 4)
    assert (request.priority, request.first_k, request.num_logprobs) == (3, 1, 4)
    assert request.hold_for_acks
    assert request.stop_token_ids == ()  # the server finds its end
    assert generate_request(line(), 0).stop_token_ids == (STOP_ID,)


def test_the_device_looks_up_lengths_by_request_and_sample():
    lengths = trace_lengths([line(output_tokens=(1, 2)), line(output_tokens=(4,))])
    found = lengths.lengths(np.array([1, 0, 0]), np.array([0, 1, 0], np.int32))
    assert found.tolist() == [4, 2, 1]


@pytest.mark.parametrize("kind", WORKLOADS)
def test_a_workload_is_a_trace_that_depends_on_the_seed_alone(kind):
    trace = WORKLOADS[kind](7, 0.02)
    assert trace == WORKLOADS[kind](7, 0.02) != WORKLOADS[kind](8, 0.02)
    file = io.BytesIO()
    write_trace(trace, file)
    assert read_trace(io.BytesIO(file.getvalue())) == trace
    outputs = [count for request in trace for count in request.output_tokens]
    assert len(set(outputs)) > 10
    longest = max(request.prompt_tokens + request.max_tokens for request in trace)
    assert max_request_tokens(trace) == longest
