"""The public ``SamplingParams``: what a client may ask of sampling, checked when it is made.

It owns the allowed ranges. It knows neither the model nor the configuration: limits that depend on
them (the context's length, ``max_topk_logprobs``) are checked when a request is prepared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, cast

from tokasaurus.errors import RequestError, TokasaurusError
from tokasaurus.protocol.messages import MAX_PRIORITY, SAMPLING_LIMITS, LogprobsMode
from tokasaurus.text.structured_output import check_structured_outputs

__all__ = ["MAX_SAMPLES", "SamplingParams", "renamed"]

MAX_SAMPLES = 1 << 16  # of one request, over all its prompts
MAX_STOP_STRINGS = 128
MAX_STOP_CHARS = 1024  # of one stop string
_MAX_REPETITION_PENALTY = 1000.0
MAX_STOP_TOKEN_IDS = 128
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 256
MAX_BIASED_IDS = 1024
_MAX_BIAS = 100.0
# A value as repr writes it; an apostrophe inside a word begins none.
_QUOTED = r"""(?<!\w)(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_TOKEN_ID = re.compile("[0-9]{1,10}")


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt.

    ``None`` means "left out": the generation config decides, or else the default named here.

    Args:
        n: samples per prompt.
        temperature: 0, or anything below 0.00001, always takes the likeliest token; default 1.
        top_p: draw from the likeliest tokens that together have this probability; default 1 (off).
            0 leaves only the likeliest token.
        top_k: draw from this many of the likeliest tokens; -1 or 0 is off, the default.
        min_p: leave out tokens less likely than this share of the likeliest; default 0 (off).
        seed: makes the samples reproducible, whatever else the engine runs; from -2^63 to 2^63-1.
            -1 is no seed.
        stop: texts that end a sample; they are not part of its text.
        ignore_eos: go on after an end-of-sequence token.
        stop_token_ids: further tokens that end a sample; their text is not part of its text.
        min_tokens: of each sample, before a token or text may end it.
        frequency_penalty: lowers a token's logit by this for each time that the sample holds the
            token; from -2 to 2.
        presence_penalty: lowers a token's logit by this once if the sample holds the token; from -2
            to 2.
        repetition_penalty: divides the logits of tokens in the prompt or the sample by this, or
            multiplies negative ones; above 0, and 1 is off.
        logit_bias: added to the logits of token ids; from -100 to 100.
        bad_words: texts that a sample must not hold; a token that completes one is never drawn.
        max_tokens: of each sample; None is as many as fit.
        logprobs: of generated tokens: 0 is the chosen token's, k also those of the k likeliest.
        prompt_logprobs: of the prompt's tokens, in the same way.
        logprobs_mode: the distribution that logprobs are taken from, "temperature", "raw" or
            "processed"; default the engine's.
        priority: lower runs first; among equals, the request that came first. From -1,000,000 to
            1,000,000.
        first_k: take the k samples of each prompt that end first, then cancel its others; from 1 to
            n, default all. The samples taken keep their index among the n.
        structured_outputs: what every sample's text must be: ``{"json": schema}``,
            ``{"regex": ...}``, ``{"choice": [...]}``, ``{"grammar": ...}`` (Lark or GBNF) or
            ``{"json_object": True}``. A sample then ends when its text is complete, or by length.
        receipt: the output gets a receipt, which ``toka-verify`` checks.

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
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    min_tokens: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | Mapping[str, float] | None = None
    bad_words: list[str] | tuple[str, ...] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprobs_mode: LogprobsMode | str | None = None
    priority: int = 0
    first_k: int | None = None
    structured_outputs: Mapping[str, Any] | None = None
    receipt: bool = False

    def __post_init__(self) -> None:
        _check_int("n", self.n, 1, MAX_SAMPLES)
        for name, limits in SAMPLING_LIMITS.items():
            if getattr(self, name) is not None:
                check = _check_int if name == "top_k" else _check_number
                check(name, getattr(self, name), *limits)
        if self.seed is not None:
            _check_int("seed", self.seed, -(1 << 63), (1 << 63) - 1)
        for name in ("ignore_eos", "receipt"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(
                    f"{name} must be true or false, not {getattr(self, name)!r}", name
                )
        for name in ("frequency_penalty", "presence_penalty"):
            _check_number(name, getattr(self, name), -2.0, 2.0)
        _check_number(
            "repetition_penalty",
            self.repetition_penalty,
            1 / _MAX_REPETITION_PENALTY,
            _MAX_REPETITION_PENALTY,
        )
        _check_int("min_tokens", self.min_tokens, 0, (1 << 31) - 1)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, (1 << 31) - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, (1 << 31) - 1)
        _check_int("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        if self.first_k is not None:
            _check_first_k(self.first_k, self.n)
        if self.structured_outputs is not None:
            self._check_structured_outputs(self.structured_outputs)
        object.__setattr__(self, "stop", _checked_stop(self.stop))
        if self.stop_token_ids is not None:
            object.__setattr__(self, "stop_token_ids", _checked_ids(self.stop_token_ids))
        if self.bad_words is not None:
            object.__setattr__(self, "bad_words", _checked_words(self.bad_words))
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        object.__setattr__(self, "logprobs_mode", _checked_mode(self.logprobs_mode))

    def _check_structured_outputs(self, value: Any) -> None:
        if self.ignore_eos:
            raise RequestError(
                "ignore_eos cannot be combined with structured output: where the text is complete,"
                " nothing but its end may follow",
                "ignore_eos",
            )
        object.__setattr__(self, "structured_outputs", check_structured_outputs(value))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return self.stop if isinstance(self.stop, tuple) else ()


def renamed(error: TokasaurusError, names: Mapping[str, str]) -> TokasaurusError:
    """The same error with the client's name for the field.

    Args:
        error: any error; only a RequestError about one of the fields changes.
        names: the client's names, by the names used here.
    """
    if not isinstance(error, RequestError) or error.field is None or error.field not in names:
        return error
    field = error.field
    name = names[field]
    # What the client sent is quoted in the message, and stays as it was sent.
    message = re.sub(
        rf"{_QUOTED}|\b{re.escape(field)}\b",
        lambda found: name if found[0] == field else found[0],
        error.message,
    )
    return type(error)(message, name)


def _check_whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise RequestError(f"{name} must be a whole number, not {value!r}", name)


def _check_int(name: str, value: Any, low: float, high: float) -> None:
    _check_whole(name, value)
    if not low <= int(value) <= high:
        raise RequestError(f"{name} must be from {low} to {high}, not {value}", name)


def _check_first_k(first_k: Any, n: int) -> None:
    _check_whole("first_k", first_k)
    if not 1 <= first_k <= n:
        raise RequestError(
            f"first_k must be from 1 to n={n}, not {first_k}; leave it out to wait for all n"
            " samples",
            "first_k",
        )


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise RequestError(f"{name} must be a number, not {value!r}", name)
    # Compared as it is: a whole number may be too large for a float.
    if not low <= cast(float, value) <= high:
        raise RequestError(f"{name} must be from {low:g} to {high:g}, not {value!r}", name)


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


def _checked_ids(ids: Any) -> tuple[int, ...]:
    """``stop_token_ids``, every id once."""
    if not isinstance(ids, (list, tuple)):
        raise RequestError(
            f"stop_token_ids must be a list of token ids, not {ids!r}", "stop_token_ids"
        )
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise RequestError(
            f"stop_token_ids may hold at most {MAX_STOP_TOKEN_IDS} ids, not {len(ids)}",
            "stop_token_ids",
        )
    for token_id in ids:
        _check_int("stop_token_ids", token_id, 0, (1 << 31) - 1)
    return tuple(dict.fromkeys(map(int, ids)))


def _checked_words(words: Any) -> tuple[str, ...]:
    """``bad_words``, every word once."""
    if not isinstance(words, (list, tuple)):
        raise RequestError(f"bad_words must be a list of strings, not {words!r}", "bad_words")
    if len(words) > MAX_BAD_WORDS:
        raise RequestError(
            f"bad_words may hold at most {MAX_BAD_WORDS} strings, not {len(words)}", "bad_words"
        )
    for word in words:
        if not isinstance(word, str) or not word.strip(" "):
            raise RequestError(f"bad_words must hold words, not {word!r}", "bad_words")
        if len(word) > MAX_BAD_WORD_CHARS:
            raise RequestError(
                f"bad_words must hold strings of at most {MAX_BAD_WORD_CHARS} characters, not of"
                f" {len(word)}",
                "bad_words",
            )
    return tuple(dict.fromkeys(words))


def _checked_bias(bias: Any) -> dict[int, float]:
    """``logit_bias`` in the order of token ids. JSON has only strings for keys."""
    if not isinstance(bias, Mapping):
        raise RequestError(
            f"logit_bias must map token ids to numbers, not be {bias!r}", "logit_bias"
        )
    if len(bias) > MAX_BIASED_IDS:
        raise RequestError(
            f"logit_bias may hold at most {MAX_BIASED_IDS} ids, not {len(bias)}", "logit_bias"
        )
    checked: dict[int, float] = {}
    for key, value in bias.items():
        if isinstance(key, str) and _TOKEN_ID.fullmatch(key):
            key = int(key)
        if isinstance(key, bool) or not isinstance(key, Integral) or int(key) < 0:
            raise RequestError(
                f"logit_bias must have token ids for keys, not {key!r}", "logit_bias"
            )
        if int(key) in checked:
            raise RequestError(f"logit_bias names the id {int(key)} twice", "logit_bias")
        _check_number("logit_bias", value, -_MAX_BIAS, _MAX_BIAS)
        checked[int(key)] = float(value)
    return dict(sorted(checked.items()))


def _checked_mode(mode: Any) -> LogprobsMode | None:
    if mode is None or isinstance(mode, LogprobsMode):
        return mode
    names = {each.name.lower(): each for each in LogprobsMode}
    if not isinstance(mode, str) or mode not in names:
        choices = ", ".join(names)
        raise RequestError(f"logprobs_mode must be one of {choices}, not {mode!r}", "logprobs_mode")
    return names[mode]
