"""What a plan has to serve: a trace, or the shape of one, as in ``prompt=1024,output=256,n=8``.

========  ========  ================================================================================
key       default   meaning
========  ========  ================================================================================
prompt    required  tokens of each prompt
output    required  tokens that a sample generates: the mean, if they differ
n         1         samples of each request
requests  1         requests
prefix    0         leading tokens of the prompt that all requests share
max       output    the limit that the manager knows; with spread, 4 times output
spread    0         how much outputs differ: the sigma of their log-normal distribution
rate      none      requests a second that arrive, at random; without it all are there at once
========  ========  ================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from tokasaurus.config.suggestions import nearest
from tokasaurus.errors import ConfigError
from tokasaurus.planner.trace import TraceRequest
from tokasaurus.protocol.arrays import Int64Array
from tokasaurus.rounding import ceil_div

__all__ = ["Demand", "demand_of_shape", "is_shape"]

_COUNTS = ("prompt", "output", "n", "requests", "prefix", "max")
_NUMBERS = ("spread", "rate")
_KEYS = (*_COUNTS, *_NUMBERS)
_MAX_SAMPLES = 4_000_000  # that a shape may have, since each has an entry of the trace
_MOST = {**dict.fromkeys(_COUNTS, (1 << 31) - 1), "spread": 10}
_LONGEST = 4  # the limit of spread outputs, as a multiple of their mean


@dataclass(frozen=True)
class Demand:
    """A trace and what it adds up to.

    Attributes:
        trace: its requests, by arrival.
        source: what the user called it.
    """

    trace: Sequence[TraceRequest]
    source: str

    def __post_init__(self) -> None:
        if not self.trace:
            raise ConfigError(f"workload={self.source} has no requests")

    @property
    def num_requests(self) -> int:
        return len(self.trace)

    @property
    def num_sequences(self) -> int:
        return sum(len(request.output_tokens) for request in self.trace)

    @property
    def num_prompt_tokens(self) -> int:
        """Of all requests, each once, with the prefixes that they share."""
        return sum(request.prompt_tokens for request in self.trace)

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens of all samples. ``first_k`` may end samples before."""
        return sum(sum(request.output_tokens) for request in self.trace)

    @property
    def longest(self) -> int:
        """Tokens that a sequence may reach, at most."""
        return max(request.prompt_tokens + request.max_tokens for request in self.trace)

    @property
    def arrives_at_once(self) -> bool:
        return self.trace[-1].arrival_s == 0

    def dealt(self, count: int, seats: int) -> list[Demand]:
        """The demands of ``count`` replicas with equal loads.

        Like the router, it gives a request to the replica that has least to do, and the samples of
        one that exceed a replica's seats to several. A replica's demand may be empty, and is left
        out then.

        Args:
            count: of replicas.
            seats: the sequences that a replica runs at a time.
        """
        if count == 1:
            return [self]
        loads = np.zeros(count)
        parts: list[list[TraceRequest]] = [[] for _ in range(count)]
        for request in self.trace:
            for part in _pieces(request, count, seats):
                replica = int(loads.argmin())
                parts[replica].append(part)
                loads[replica] += part.prompt_tokens + sum(part.output_tokens)
        return [Demand(part, self.source) for part in parts if part]

    def first(self, num_sequences: int) -> Demand:
        """The requests up to this number of sequences. A request is cut if it is the first."""
        kept: list[TraceRequest] = []
        left = num_sequences
        for request in self.trace:
            if kept and len(request.output_tokens) > left:
                break
            kept.append(_first_samples(request, left))
            left -= len(request.output_tokens)
        return Demand(kept, self.source) if len(kept) < len(self.trace) or left < 0 else self


def _first_samples(request: TraceRequest, count: int) -> TraceRequest:
    if len(request.output_tokens) <= count:
        return request
    return _with_samples(request, request.output_tokens[:count])


def _pieces(request: TraceRequest, count: int, seats: int) -> list[TraceRequest]:
    num_samples = len(request.output_tokens)
    if num_samples <= seats:
        return [request]
    size = max(ceil_div(num_samples, count), 1)
    return [
        _with_samples(request, request.output_tokens[start : start + size])
        for start in range(0, num_samples, size)
    ]


def _with_samples(request: TraceRequest, output_tokens: tuple[int, ...]) -> TraceRequest:
    first_k = min(request.first_k, len(output_tokens))
    return msgspec.structs.replace(request, output_tokens=output_tokens, first_k=first_k)


# --- shapes ---------------------------------------------------------------------------------------


def is_shape(text: str) -> bool:
    """Whether a workload is a shape, and not the name of a file."""
    return "=" in text


def demand_of_shape(text: str, seed: int = 0) -> Demand:
    """The trace of a shape. The same seed gives the same trace.

    Raises:
        ConfigError: the text is not a shape, or its numbers contradict one another.
    """
    shape = _Shape.read(text)
    chance = np.random.default_rng([seed, 4])
    outputs = shape.outputs(chance)
    arrivals = np.zeros(shape.requests)
    if shape.rate:
        arrivals = np.cumsum(chance.exponential(1 / shape.rate, shape.requests))
    trace = [
        TraceRequest(
            arrival_s=arrival_s,
            prompt_tokens=shape.prompt,
            output_tokens=tuple(row),
            max_tokens=shape.limit,
            prefix_id=0 if shape.prefix else None,
            prefix_tokens=shape.prefix,
        )
        for arrival_s, row in zip(arrivals.tolist(), outputs.tolist(), strict=True)
    ]
    return Demand(trace, text)


class _Shape(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of a shape; see the module's table."""

    prompt: int
    output: int
    n: int = 1
    requests: int = 1
    prefix: int = 0
    max: int = 0
    spread: float = 0.0
    rate: float = 0.0

    @staticmethod
    def read(text: str) -> _Shape:
        values: dict[str, float | int] = {}
        for word in text.split(","):
            key, _, value = word.strip().partition("=")
            if key not in _KEYS:
                near = nearest(key, _KEYS)
                guess = "" if near is None else f"the nearest is {near!r}, and "
                raise ConfigError(
                    f"workload={text}: {key!r} is not a part of a shape; {guess}the parts are"
                    f" {', '.join(_KEYS)}"
                )
            if key in values:
                raise ConfigError(f"workload={text}: {key} is there twice; leave one out")
            values[key] = _number(text, key, value)
        for key in ("prompt", "output"):
            if key not in values:
                raise ConfigError(
                    f"workload={text}: a shape needs {key}, as in prompt=1024,output=256"
                )
        shape = msgspec.convert(values, _Shape)
        shape._check(text)
        return shape

    @property
    def limit(self) -> int:
        """The limit of a sample's tokens."""
        return self.max or (_LONGEST * self.output if self.spread else self.output)

    def outputs(self, chance: np.random.Generator) -> Int64Array:
        """[requests, n] the tokens of each sample, whose mean is about ``output``."""
        size = (self.requests, self.n)
        if not self.spread:
            return np.full(size, self.output, np.int64)
        middle = math.log(self.output) - self.spread**2 / 2  # of a mean of exactly output
        drawn = np.rint(chance.lognormal(middle, self.spread, size))
        return np.clip(drawn, 1, self.limit).astype(np.int64)

    def _check(self, text: str) -> None:
        if self.prefix > self.prompt:
            raise ConfigError(f"workload={text}: prefix may be at most prompt")
        if self.output > self.limit:
            raise ConfigError(f"workload={text}: output may be at most max")
        if self.requests * self.n > _MAX_SAMPLES:
            raise ConfigError(
                f"workload={text} has {self.requests * self.n:,} samples, and a shape may have"
                f" {_MAX_SAMPLES:,}; plan a part of it, since its time grows with its requests"
            )


def _number(text: str, key: str, value: str) -> float | int:
    try:
        number = int(value) if key in _COUNTS else float(value)
    except ValueError:
        number = -1
    least = 0 if key in ("prefix", *_NUMBERS) else 1
    if not least <= number < math.inf:
        kind = "a whole number" if key in _COUNTS else "a number"
        raise ConfigError(
            f"workload={text}: {key} must be {kind} of at least {least}, not {value!r}"
        )
    if number > _MOST.get(key, number):
        raise ConfigError(f"workload={text}: {key} may be at most {_MOST[key]}, not {value}")
    return number
