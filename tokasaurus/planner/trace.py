"""Workloads as files: each line is a JSON object, which is a request.

    {"arrival_s": 0.25, "prompt_tokens": 300, "prefix_id": 3, "prefix_tokens": 200,
     "output_tokens": [17, 512], "max_tokens": 512}

===============  ========  =====================================================================
key              default   meaning
===============  ========  =====================================================================
arrival_s        required  seconds after the beginning at which the manager gets the request
prompt_tokens    required  the length of the prompt, at least 1
output_tokens    required  a list of how many tokens each sample generates, 1 to max_tokens. It
                           has an entry for each sample. A sample that is shorter than
                           max_tokens ends with a stop token, or with a stop string
max_tokens       required  the limit that the manager knows
prefix_id        none      requests with the same id share their first prefix_tokens ids
prefix_tokens    0         the length of the shared prefix, at most prompt_tokens
priority         0         lower runs first
stop_strings     false     the server finds the end, and acknowledges tokens as they come
first_k          0         abort the other samples once this many have ended; 0 waits for all
num_logprobs     -1        of generated tokens: -1 none, 0 the chosen one, k also the top k
===============  ========  =====================================================================

Prompts are random ids that depend on the line number and prefix_id. Lines are in order of arrival.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import IO

import msgspec
import numpy as np

from tokasaurus.errors import ConfigError
from tokasaurus.planner.lengths import ListedLengths
from tokasaurus.planner.simulated_device import STOP_ID, VOCAB_SIZE
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.protocol.messages import GenerateRequest, Sampling

__all__ = [
    "TraceRequest",
    "generate_request",
    "max_request_tokens",
    "read_trace",
    "trace_lengths",
    "write_trace",
]


class TraceRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line. The module's docstring describes the fields."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: tuple[int, ...]
    max_tokens: int
    prefix_id: int | None = None
    prefix_tokens: int = 0
    priority: int = 0
    stop_strings: bool = False
    first_k: int = 0
    num_logprobs: int = -1

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1:
            raise ValueError("prompt_tokens must be at least 1")
        if not 0 <= self.prefix_tokens <= self.prompt_tokens:
            raise ValueError("prefix_tokens must be from 0 to prompt_tokens")
        if self.prefix_tokens and (self.prefix_id is None or self.prefix_id < 0):
            raise ValueError("prefix_tokens need a prefix_id of at least 0")
        if not self.output_tokens:
            raise ValueError("output_tokens must have an entry for each sample")
        if not all(1 <= count <= self.max_tokens for count in self.output_tokens):
            raise ValueError("output_tokens must be from 1 to max_tokens")
        if not 0 <= self.arrival_s < math.inf:
            raise ValueError("arrival_s must be at least 0")
        if not 0 <= self.first_k <= len(self.output_tokens):
            raise ValueError("first_k must be from 0 to the number of output_tokens")
        if self.num_logprobs < -1:
            raise ValueError("num_logprobs must be at least -1")


_decoder = msgspec.json.Decoder(TraceRequest)
_encoder = msgspec.json.Encoder()


def write_trace(trace: Iterable[TraceRequest], file: IO[bytes]) -> None:
    """Writes a trace. Defaults are written too, so that a file explains itself."""
    for request in trace:
        file.write(_encoder.encode(request) + b"\n")


def read_trace(file: IO[bytes]) -> list[TraceRequest]:
    """Reads a trace, and skips blank lines.

    Raises:
        ConfigError: a line is not a request, or arrives before the line above it. The message names
            the line.
    """
    trace: list[TraceRequest] = []
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            request = _decoder.decode(line)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"line {number} of the trace: {error}") from None
        if trace and request.arrival_s < trace[-1].arrival_s:
            raise ConfigError(f"line {number} of the trace arrives before the line above it")
        trace.append(request)
    if not trace:
        raise ConfigError("the trace is empty")
    return trace


def generate_request(request: TraceRequest, number: int) -> GenerateRequest:
    """The message that the server would send. Its id and seed are the number in the trace."""
    own = np.random.default_rng([number, 0])
    # The generator of a prefix is seeded apart from those of requests.
    shared = np.random.default_rng([request.prefix_id or 0, 1])
    num_own = request.prompt_tokens - request.prefix_tokens
    return GenerateRequest(
        request_id=number,
        prompt_ids=np.concatenate((_ids(shared, request.prefix_tokens), _ids(own, num_own))),
        n=len(request.output_tokens),
        max_tokens=request.max_tokens,
        sampling=Sampling(),
        seed=number,
        stop_token_ids=() if request.stop_strings else (STOP_ID,),
        num_logprobs=request.num_logprobs,
        priority=request.priority,
        first_k=request.first_k,
        hold_for_acks=request.stop_strings,
    )


def trace_lengths(trace: Sequence[TraceRequest]) -> ListedLengths:
    """The lengths of a trace whose requests :func:`generate_request` makes, for the device."""
    return ListedLengths([request.output_tokens for request in trace])


def max_request_tokens(trace: Sequence[TraceRequest]) -> int:
    """The largest length that a sequence of the trace may reach."""
    return max(request.prompt_tokens + request.max_tokens for request in trace)


def _ids(generator: np.random.Generator, count: int) -> Int32Array:
    return generator.integers(1, VOCAB_SIZE, count, dtype=np.int32)
