"""The form of a receipt, its canonical text, and its digests.

::

    {
      "receipt_version": 1,
      "model":         weights, tokenizer, chat template, config.json as it was read
      "engine":        version, kernels
      "configuration": the flags that change results
      "request":       one object for each prompt: its ids, and each sampling parameter
      "answer":        one object for each prompt: ids, text and logprobs of each sample
      "environment":   processor, threads, compiler, versions of libraries
      "digests":       {section: SHA-256 of its canonical text}
      "digest":        SHA-256 of the canonical text of receipt_version and digests
    }

The canonical text is that of RFC 8785: keys in order, no spaces, UTF-8. So a receipt may pass
through any program that reads and writes JSON: it may come back with other spaces, other escapes,
another order of keys, or 1 for 1.0. Whole numbers that a double cannot hold, such as seeds, are
texts in a receipt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import msgspec

from tokasaurus.listing import listing

__all__ = [
    "SECTIONS",
    "VERSION",
    "NotAReceipt",
    "altered_parts",
    "canonical",
    "checked",
    "digest",
    "found_in",
    "sealed",
    "void",
]

VERSION = 1
SECTIONS = ("model", "engine", "configuration", "request", "answer", "environment")

_MOST_QUOTED = 500  # characters of a value in an error message

# Doubles between these are written without an exponent.
_LEAST_PLAIN, _MOST_PLAIN = 1e-6, 1e21


class NotAReceipt(ValueError):
    """A text or a value is no receipt; says why."""


class _Logprobs(msgspec.Struct):
    chosen: str
    top_ids: list[list[int]]
    top: str


class _Choice(msgspec.Struct):
    index: int
    token_ids: list[int]
    text: str
    finish_reason: str
    logprobs: _Logprobs | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice]
    prompt_logprobs: _Logprobs | None = None


class _Request(msgspec.Struct):
    prompt_ids: list[int]
    n: int
    seed: str


class _Weights(msgspec.Struct):
    digest: str
    parts: dict[str, str]


class _Model(msgspec.Struct):
    weights: _Weights
    tokenizer: dict[str, str]


class _Receipt(msgspec.Struct):
    """What every receipt has; for checks only."""

    receipt_version: int
    model: _Model
    engine: dict[str, Any]
    configuration: dict[str, Any]
    request: list[_Request]
    answer: list[_Answer]
    environment: dict[str, Any]
    digests: dict[str, str]
    digest: str


def sealed(sections: Mapping[str, Any]) -> dict[str, Any]:
    """A receipt of these sections, with its digests."""
    digests = {name: digest(sections[name]) for name in SECTIONS}
    return {
        "receipt_version": VERSION,
        **{name: sections[name] for name in SECTIONS},
        "digests": digests,
        "digest": _digest_of_all(VERSION, digests),
    }


def void(reason: str) -> dict[str, Any]:
    """What stands in the place of a receipt that cannot be given."""
    return {"receipt_version": VERSION, "void": reason}


def found_in(text: str) -> Any:
    """The value in the place of a receipt, in a text that may hold more.

    The text is the JSON of a receipt, of an answer that has one, or of a line of a batch's output;
    or it is a stream of answers, as it came.

    Raises:
        NotAReceipt: the text is something else.
    """
    try:
        values = [json.loads(text)]
    except (ValueError, RecursionError) as error:
        values = _events(text)
        if not values:
            lines = text.split("\n")
            if len(lines) > 1 and lines[0].startswith("{") and lines[0].rstrip().endswith("}"):
                raise NotAReceipt("it has several lines; keep the line of one answer") from None
            raise NotAReceipt(f"it is not JSON: {error}") from None
    for value in values:
        found = _inside(value)
        if found is not None:
            return found
    raise NotAReceipt("it has no receipt; ask for one with receipt=true in the request")


def checked(value: Any) -> dict[str, Any]:
    """A value in the place of a receipt, if it is one.

    Raises:
        NotAReceipt: it has another form, is of another version, or says why there is no receipt.
    """
    if not isinstance(value, dict):
        raise NotAReceipt("a receipt is a JSON object")
    try:
        canonical(value)
    except (RecursionError, ValueError, OverflowError):
        raise NotAReceipt("it holds what no receipt holds: NaN, or too many brackets") from None
    if value.get("receipt_version") != VERSION:
        found = _start(repr(value.get("receipt_version")))
        raise NotAReceipt(
            f"its receipt_version is {found}, and this version of Tokasaurus reads {VERSION}"
        )
    if "void" in value:
        raise NotAReceipt(f"the answer has no receipt: {_start(str(value['void']))}")
    try:
        receipt = msgspec.convert(value, _Receipt)
    except msgspec.ValidationError as error:
        raise NotAReceipt(f"it is not complete: {error}") from None
    if not receipt.request or len(receipt.request) != len(receipt.answer):
        raise NotAReceipt(
            f"it has {len(receipt.request)} prompts and {len(receipt.answer)} answers"
        )
    more = [name for name in value if name not in _Receipt.__struct_fields__]
    if more:  # no digest covers these
        raise NotAReceipt(f"it has parts that no receipt has: {listing(more)}")
    for answer in receipt.answer:
        indices = [choice.index for choice in answer.choices]
        if len(set(indices)) < len(indices):
            raise NotAReceipt("an answer has two choices with the same index")
    return value


def altered_parts(receipt: Mapping[str, Any]) -> list[str]:
    """The parts that do not fit the digests of a receipt; none if nothing was altered.

    Args:
        receipt: with all of its keys.
    """
    digests = receipt["digests"]
    altered = [name for name in SECTIONS if digests.get(name) != digest(receipt[name])]
    if receipt["digest"] != _digest_of_all(receipt["receipt_version"], digests):
        altered.append("digests")
    return altered


def digest(value: Any) -> str:
    """The SHA-256 of the canonical text of a JSON value, in hexadecimal."""
    return hashlib.sha256(canonical(value)).hexdigest()


def canonical(value: Any) -> bytes:
    """The canonical text of a JSON value."""
    return _written(value).encode("utf-8", "surrogatepass")


def _events(text: str) -> list[Any]:
    """The JSON of each event of a stream; none if the text is something else."""
    values = []
    for line in text.split("\n"):  # splitlines would also split texts at U+2028
        if line.startswith("data: {"):
            with contextlib.suppress(ValueError, RecursionError):
                values.append(json.loads(line.removeprefix("data: ")))
    return values


def _inside(value: Any) -> Any:
    """The receipt that a value is or has; None if there is none."""
    while isinstance(value, dict):
        if "receipt_version" in value:
            return value
        if value.get("receipt") is not None:
            return value["receipt"]
        response = value.get("response")
        value = (response.get("body") or response) if isinstance(response, dict) else None
    return None


def _digest_of_all(version: Any, digests: Any) -> str:
    return digest({"receipt_version": version, "digests": digests})


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        items = sorted(value.items(), key=lambda item: item[0].encode("utf-16-be", "surrogatepass"))
        return "{" + ",".join(f"{_text(key)}:{_written(each)}" for key, each in items) + "}"
    if isinstance(value, list | tuple):
        if set(map(type, value)) <= {int}:  # many, such as token ids
            return json.dumps(value, separators=(",", ":"))
        return "[" + ",".join(map(_written, value)) + "]"
    if isinstance(value, float):
        return _number(value)
    return _text(value)


def _text(value: str | int | bool | None) -> str:
    return json.dumps(value, ensure_ascii=False)


def _start(text: str) -> str:
    return text if len(text) <= _MOST_QUOTED else f"{text[:_MOST_QUOTED]}..."


def _number(value: float) -> str:
    """A double as JavaScript writes it."""
    if value == 0:
        return "0"
    shortest = Decimal(repr(value)).normalize()
    if _LEAST_PLAIN <= abs(value) < _MOST_PLAIN:
        return f"{shortest:f}"
    mantissa, _, exponent = f"{shortest:e}".partition("e")
    return f"{mantissa}e{int(exponent):+d}"
