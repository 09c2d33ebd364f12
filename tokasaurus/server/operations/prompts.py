"""Prompts in one field of a request: a text, a list of token ids, or a list of either."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import WithJsonSchema

from tokasaurus.errors import RequestError
from tokasaurus.text.params import MAX_SAMPLES

__all__ = ["TOKEN_IDS", "Prompts", "read_prompts"]

TOKEN_IDS = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
Prompts: TypeAlias = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                TOKEN_IDS,
                {"type": "array", "items": TOKEN_IDS, "minItems": 1},
            ]
        }
    ),
]
"""One prompt or several, as text or as ids. ``read_prompts`` checks it, faster than pydantic."""


def read_prompts(field: str, value: Any, num_samples: int = 1) -> list[str | list[int]]:
    """The prompts that a field holds.

    Args:
        field: its name, for errors.
        value: of the field.
        num_samples: of each prompt.

    Raises:
        RequestError: the value has another shape, or there are too many prompts or samples.
    """
    if isinstance(value, str):
        prompts: list[Any] = [value]
    elif not isinstance(value, list) or not value:
        raise _wrong_prompt(field)
    elif isinstance(value[0], int):
        prompts = [value]
    else:
        prompts = value
    kind = str if isinstance(prompts[0], str) else list
    for each in prompts:
        if not isinstance(each, kind):
            raise _wrong_prompt(field)
        if kind is list and not all(type(token_id) is int for token_id in each):
            raise _wrong_prompt(field)
    if num_samples > MAX_SAMPLES:
        raise RequestError(f"n must be from 1 to {MAX_SAMPLES}, not {num_samples}", "n")
    if len(prompts) * num_samples > MAX_SAMPLES:
        raise RequestError(
            f"{field} has {len(prompts)} prompts, for n={num_samples} samples each; one request"
            f" may have {MAX_SAMPLES} samples in all",
            field,
        )
    return prompts


def _wrong_prompt(field: str) -> RequestError:
    return RequestError(
        f"{field} must be a string, a list of strings, a list of token ids, or a list of such"
        " lists",
        field,
    )
