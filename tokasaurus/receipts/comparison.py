"""What differs between a receipt and the one of the same request, run again: in plain words."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokasaurus.listing import listing

__all__ = ["Difference", "differences"]

_MOST_SHOWN = 60  # characters of a value
_SHOWN_BEFORE = 20  # of these, before the first character that differs


@dataclass(frozen=True)
class Difference:
    """One thing that differs.

    Attributes:
        text: what, with both values.
        decides: the receipt does not hold. Otherwise the difference is only told: it may explain
            another one, and alone it changes nothing.
    """

    text: str
    decides: bool = True


def differences(receipt: Mapping[str, Any], again: Mapping[str, Any]) -> list[Difference]:
    """Compares two receipts.

    Args:
        receipt: to verify.
        again: of the same request, run again.
    """
    found = [
        *_of_models(receipt["model"], again["model"]),
        *_of_values("engine", receipt["engine"], again["engine"]),
        *_of_values("configuration", receipt["configuration"], again["configuration"]),
    ]
    prompts = len(receipt["request"]) > 1
    pairs = zip(receipt["request"], again["request"], strict=True)
    for number, (mine, its) in enumerate(pairs):
        found += _of_requests(f"request {number}" if prompts else "request", mine, its)
    pairs = zip(receipt["answer"], again["answer"], strict=True)
    for number, (mine, its) in enumerate(pairs):
        found += _of_answers(f"prompt {number}, " if prompts else "", mine, its)
    told = _of_values("environment", receipt["environment"], again["environment"])
    return [*map(Difference, found), *(Difference(text, False) for text in told)]


def _of_models(mine: Mapping[str, Any], its: Mapping[str, Any]) -> Iterator[str]:
    if mine["weights"] != its["weights"]:
        yield f"weights: {_weights(mine['weights'], its['weights'])}"
    words = {"digest": "the tokenizer is another", "chat_template": "the chat template is another"}
    for name, said in words.items():
        if mine["tokenizer"].get(name) != its["tokenizer"].get(name):
            yield said
    yield from _of_values(
        "model.tokenizer", *(_without(each["tokenizer"], *words) for each in (mine, its))
    )
    rest = (_without(each, "weights", "tokenizer") for each in (mine, its))
    yield from _of_values("model", *rest)


def _weights(mine: Mapping[str, Any], its: Mapping[str, Any]) -> str:
    before, now = mine["parts"], its["parts"]
    changed = [name for name in before if name in now and before[name] != now[name]]
    missing = [name for name in before if name not in now]
    added = [name for name in now if name not in before]
    said = []
    if changed:
        said.append(f"{listing(changed)} differ" + ("s" if len(changed) == 1 else ""))
    if missing:
        said.append(f"only the receipt has {listing(missing)}")
    if added:
        said.append(f"only this engine has {listing(added)}")
    return "; ".join(said) or "they differ"


def _of_values(path: str, mine: Any, its: Any) -> Iterator[str]:
    """The leaves of two JSON values that differ."""
    if isinstance(mine, Mapping) and isinstance(its, Mapping):
        for name in [*mine, *(name for name in its if name not in mine)]:
            yield from _of_values(f"{path}.{name}", mine.get(name), its.get(name))
    elif mine != its or isinstance(mine, bool) != isinstance(its, bool):
        here, there = _shown(its, mine)
        yield f"{path} is {here} here, and {there} in the receipt"


def _of_requests(name: str, mine: Mapping[str, Any], its: Mapping[str, Any]) -> Iterator[str]:
    place = _first_difference(mine["prompt_ids"], its["prompt_ids"])
    if place is not None:
        ours, theirs = _at(its["prompt_ids"], place), _at(mine["prompt_ids"], place)
        yield f"{name}: prompt token {place} is {ours} here, and {theirs} in the receipt"
    yield from _of_values(name, *(_without(each, "prompt_ids") for each in (mine, its)))


def _of_answers(prompt: str, mine: Mapping[str, Any], its: Mapping[str, Any]) -> Iterator[str]:
    before = {choice["index"]: choice for choice in mine["choices"]}
    now = {choice["index"]: choice for choice in its["choices"]}
    for index in sorted(before.keys() | now.keys()):
        name = f"{prompt}choice {index}"
        if index not in before or index not in now:
            yield f"{name} is only {'here' if index in now else 'in the receipt'}"
        else:
            yield from _of_choices(name, before[index], now[index])
    values = mine.get("prompt_logprobs"), its.get("prompt_logprobs")
    yield from _of_logprobs(f"{prompt}prompt", 1, *values)
    rest = (_without(each, "choices", "prompt_logprobs") for each in (mine, its))
    yield from _of_values(f"{prompt}answer", *rest)


def _of_choices(name: str, mine: Mapping[str, Any], its: Mapping[str, Any]) -> Iterator[str]:
    place = _first_difference(mine["token_ids"], its["token_ids"])
    if place is not None:
        ours, theirs = _at(its["token_ids"], place), _at(mine["token_ids"], place)
        yield f"{name}: token {place} is {ours} here, and {theirs} in the receipt"
        return  # the rest follows from it
    yield from _of_values(f"{name}: finish_reason", mine["finish_reason"], its["finish_reason"])
    yield from _of_values(f"{name}: text", mine["text"], its["text"])
    yield from _of_logprobs(name, 0, mine.get("logprobs"), its.get("logprobs"))
    compared = ("index", "token_ids", "finish_reason", "text", "logprobs")
    yield from _of_values(name, *(_without(each, *compared) for each in (mine, its)))


def _of_logprobs(name: str, first: int, mine: Any, its: Any) -> Iterator[str]:
    """The first logprob that differs in a bit; ``first`` is the position of the first one."""
    if mine is None or its is None:
        if mine is not its:
            yield f"{name}: logprobs are only {'here' if mine is None else 'in the receipt'}"
        return
    bits = [
        [each["chosen"][i : i + 8] for i in range(0, len(each["chosen"]), 8)]
        for each in (mine, its)
    ]
    place = _first_difference(*bits)
    if place is not None:
        before, now = (_float(each, place) for each in bits)
        said = f"{now} here, and {before} in the receipt"
        yield f"{name}: the logprob of token {place + first} is {said}"
    elif mine != its:
        rows = list(zip(mine["top_ids"], its["top_ids"], strict=False))
        place = next((i for i, (one, other) in enumerate(rows) if one != other), None)
        at = "" if place is None else f", at token {place + first}"
        yield f"{name}: the likeliest tokens or their logprobs differ{at}"


def _first_difference(mine: Sequence[Any], its: Sequence[Any]) -> int | None:
    """The first position at which two lists differ; None if they are equal."""
    for place in range(max(len(mine), len(its))):
        if _at(mine, place) != _at(its, place):
            return place
    return None


def _at(values: Sequence[Any], place: int) -> Any:
    return values[place] if place < len(values) else "missing"


def _float(bits: Sequence[str], place: int) -> str:
    try:
        return repr(struct.unpack(">f", bytes.fromhex(_at(bits, place)))[0])
    except (ValueError, struct.error):
        return str(_at(bits, place))


def _without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _shown(one: Any, other: Any) -> tuple[str, str]:
    """Two values that differ; of long ones, a part that shows a difference."""
    texts = _text(one), _text(other)
    begin = 0
    if max(map(len, texts)) > _MOST_SHOWN:
        place = _first_difference(*texts) or 0
        begin = 0 if place < _MOST_SHOWN else place - _SHOWN_BEFORE
    return _part(texts[0], begin), _part(texts[1], begin)


def _part(text: str, begin: int) -> str:
    end = begin + _MOST_SHOWN
    return f"{'...' if begin else ''}{text[begin:end]}{'...' if end < len(text) else ''}"


def _text(value: Any) -> str:
    return "missing" if value is None else str(value) if isinstance(value, str) else repr(value)
