"""Reads the query of a URL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastapi import Request

from tokasaurus.errors import RequestError

__all__ = ["choice", "choices", "read_query", "truth", "whole_number"]


def read_query(request: Request, known: Sequence[str]) -> Mapping[str, str]:
    """The parameters. Raises RequestError if one is unknown or comes twice."""
    parameters: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in known:
            raise RequestError(
                f"{name} is not a parameter of this request; it may have {', '.join(known)}", name
            )
        if name in parameters:
            raise RequestError(f"{name} was given twice", name)
        parameters[name] = value
    return parameters


def whole_number(
    parameters: Mapping[str, str], name: str, default: int, low: int, high: int
) -> int:
    """A whole number. Raises RequestError if it is something else, or out of range."""
    text = parameters.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and low <= int(text) <= high):
        raise RequestError(
            f"{name} must be a whole number from {low} to {high}, not {text!r}", name
        )
    return int(text)


def choice(parameters: Mapping[str, str], name: str, choices: Sequence[str]) -> str:
    """One of the choices, the first by default. Raises RequestError."""
    value = parameters.get(name, choices[0])
    if value not in choices:
        raise RequestError(f"{name} must be one of {', '.join(choices)}, not {value!r}", name)
    return value


def choices(request: Request, name: str, known: Sequence[str]) -> list[str] | None:
    """The values of the only parameter, which may come several times; None if it does not come.

    Raises RequestError.
    """
    for given, value in request.query_params.multi_items():
        if given != name:
            raise RequestError(
                f"{given} is not a parameter of this request; it may have {name}", given
            )
        if value not in known:
            raise RequestError(f"{name} must be one of {', '.join(known)}, not {value!r}", name)
    return request.query_params.getlist(name) or None


def truth(parameters: Mapping[str, str], name: str, *, default: bool) -> bool:
    """True or false. Raises RequestError if it is something else."""
    text = parameters.get(name, str(default)).lower()
    if text not in ("true", "false", "1", "0"):
        raise RequestError(f"{name} must be true or false, not {parameters[name]!r}", name)
    return text in ("true", "1")
