"""What a client may ask of sampling: the public ``SamplingParams``, checked when it is made.

Owns the allowed ranges. Knows neither the model nor the configuration: what depends on them (the
context's length, ``max_topk_logprobs``) is checked where a request is prepared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from tokasaurus.errors import RequestError, TokasaurusError
from tokasaurus.protocol.messages import MAX_PRIORITY, LogprobsMode

__all__ = ["MAX_SAMPLES", "SamplingParams", "renamed"]

MAX_SAMPLES = 1 << 16  # of one request, over all its prompts
MAX_STOP_STRINGS = 128
MAX_STOP_CHARS = 1024  # of one stop string
_MIN_TEMPERATURE = 1e-5  # below it, dividing by the temperature leaves fp32
_MAX_TEMPERATURE = 100.0


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt.

    ``None`` means "left out": the model's generation config decides where it says something, else
    the default named here.

    Args:
        n: samples per prompt.
        temperature: 0 always takes the likeliest token; default 1.
        top_p: draw from the likeliest tokens that together have this probability; default 1 (off).
        top_k: draw from so many likeliest tokens; -1 or 0 is off, the default.
        min_p: leave out tokens less likely than this share of the likeliest; default 0 (off).
        seed: makes the samples reproducible, whatever else the engine runs.
        stop: texts that end a sample; they are not part of its text.
        ignore_eos: go on after an end-of-sequence token.
        max_tokens: of each sample; None is as many as fit.
        logprobs: of generated tokens: 0 the chosen one's, k also those of the k likeliest.
        prompt_logprobs: of the prompt's tokens, likewise.
        logprobs_mode: the distribution that logprobs are taken from, "temperature", "raw" or
            "processed"; default the engine's.
        priority: lower runs first; of two with the same, the one that came first. From -1,000,000 to
            1,000,000.
        first_k: take the k samples of each prompt that end first, and cancel its other samples then;
            from 1 to n. Default all. The samples taken keep their index among the n.

    Raises:
        RequestError: a value is of the wrong type or out of range; names the field.
    """

    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | tuple[str, ...] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprobs_mode: LogprobsMode | str | None = None
    priority: int = 0
    first_k: int | None = None

    def __post_init__(self) -> None:
        _check_int("n", self.n, 1, MAX_SAMPLES)
        if self.temperature is not None and self.temperature != 0:
            _check_number(
                "temperature", self.temperature, _MIN_TEMPERATURE, _MAX_TEMPERATURE, "0, or "
            )
        if self.top_p is not None:
            _check_number("top_p", self.top_p, 0.0, 1.0)
            if self.top_p == 0:
                raise RequestError("top_p must be above 0, and at most 1", "top_p")
        if self.top_k is not None:
            _check_int("top_k", self.top_k, -1, (1 << 31) - 1)
        if self.min_p is not None:
            _check_number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, (1 << 63) - 1)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(
                f"ignore_eos must be true or false, not {self.ignore_eos!r}", "ignore_eos"
            )
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, (1 << 31) - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, (1 << 31) - 1)
        _check_int("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        if self.first_k is not None:
            _check_first_k(self.first_k, self.n)
        object.__setattr__(self, "stop", _checked_stop(self.stop))
        object.__setattr__(self, "logprobs_mode", _checked_mode(self.logprobs_mode))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, however they were given."""
        return self.stop if isinstance(self.stop, tuple) else ()


def renamed(error: TokasaurusError, names: Mapping[str, str]) -> TokasaurusError:
    """The same error in the words of a client that spells the field differently."""
    if not isinstance(error, RequestError) or error.field is None or error.field not in names:
        return error
    field = error.field
    message = re.sub(rf"\b{field}\b", names[field], error.message)
    return type(error)(message, names[field])


def _check_whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise RequestError(f"{name} must be a whole number, not {value!r}", name)


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    _check_whole(name, value)
    if not low <= int(value) <= high:
        raise RequestError(f"{name} must be from {low} to {high}, not {value}", name)


def _check_first_k(first_k: Any, n: int) -> None:
    _check_whole("first_k", first_k)
    if not 1 <= first_k <= n:
        raise RequestError(
            f"first_k must be from 1 to n={n}, not {first_k}; leave it out to wait for all n samples",
            "first_k",
        )


def _check_number(name: str, value: Any, low: float, high: float, also: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise RequestError(f"{name} must be a number, not {value!r}", name)
    if not low <= float(value) <= high:
        raise RequestError(f"{name} must be {also}from {low:g} to {high:g}, not {value!r}", name)


def _checked_stop(stop: Any) -> tuple[str, ...]:
    """Every stop string once, in the order given."""
    strings = (
        [stop] if isinstance(stop, str) else list(stop) if isinstance(stop, (list, tuple)) else []
    )
    if stop is not None and not isinstance(stop, (str, list, tuple)):
        raise RequestError(f"stop must be a string or a list of strings, not {stop!r}", "stop")
    if len(strings) > MAX_STOP_STRINGS:
        raise RequestError(
            f"stop may hold at most {MAX_STOP_STRINGS} strings, not {len(strings)}", "stop"
        )
    for string in strings:
        if not isinstance(string, str):
            raise RequestError(f"stop must hold strings, not {string!r}", "stop")
        if not 1 <= len(string) <= MAX_STOP_CHARS:
            raise RequestError(
                f"stop must hold strings of 1 to {MAX_STOP_CHARS} characters, not of {len(string)}",
                "stop",
            )
    return tuple(dict.fromkeys(strings))


def _checked_mode(mode: Any) -> LogprobsMode | None:
    if mode is None or isinstance(mode, LogprobsMode):
        return mode
    names = {each.name.lower(): each for each in LogprobsMode}
    if not isinstance(mode, str) or mode not in names:
        choices = ", ".join(names)
        raise RequestError(f"logprobs_mode must be one of {choices}, not {mode!r}", "logprobs_mode")
    return names[mode]
