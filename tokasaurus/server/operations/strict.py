"""The base of everything that is read from a client's JSON, and the errors for wrong JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from tokasaurus.errors import RequestError
from tokasaurus.untrusted_json import shown

__all__ = ["StrictSchema", "validated"]


_SCHEMA_NAMES: set[str] = set()
"""With these names pydantic tells the schemas in a union apart; clients do not know them."""


class StrictSchema(BaseModel):
    """Refuses unknown fields, and values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _SCHEMA_NAMES.add(cls.__name__)


S = TypeVar("S", bound=StrictSchema)


def validated(fields: Any, schema: type[S]) -> S:
    """Reads decoded JSON. Raises RequestError if it does not fit the schema; names the field.

    An unknown field that is null is as good as left out, at any depth: it is removed.
    """
    if not isinstance(fields, dict):
        raise RequestError("the body must be a JSON object")
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        nulls = [each["loc"] for each in error.errors() if _is_unknown_null(each)]
        if not nulls:
            raise _as_request_error(error) from None
    for location in nulls:
        _remove(fields, location)
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise _as_request_error(error) from None


def _is_unknown_null(error: ErrorDetails) -> bool:
    return error["type"] == "extra_forbidden" and error["input"] is None


def _remove(fields: Any, location: Sequence[str | int]) -> None:
    """Removes a field that is null.

    Pydantic's names for members of unions are in its location, and are skipped. The field stays if
    a client's field has such a name.
    """
    *steps, name = location
    for step in steps:
        known: Any = range(len(fields)) if isinstance(fields, list) else fields
        if isinstance(fields, list | dict) and step in known:
            fields = cast(Any, fields)[step]
    if isinstance(fields, dict) and fields.get(name) is None:
        fields.pop(name, None)


def _as_request_error(error: ValidationError) -> RequestError:
    """The first error; of a union, the error of the member that came furthest."""
    first = max(
        _of_the_kind_meant(error.errors(include_url=False)),
        key=lambda each: (len(each["loc"]), not each["type"].endswith("_type")),
    )
    field = str(first["loc"][0])
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return RequestError(f"{field} is required", field)
    if first["type"] == "extra_forbidden":
        return RequestError(f"{_path(first['loc'])} is not a known field", field)
    said = f"{_path(first['loc'])} {_expectation(first)}, not {shown(first['input'])}"
    return RequestError(said, field)


def _of_the_kind_meant(errors: list[ErrorDetails]) -> list[ErrorDetails]:
    """The errors of those members of a union which have the ``type`` that was sent; else all."""
    others = {
        each["loc"][:-1]
        for each in errors
        if each["type"] == "literal_error" and each["loc"][-1] == "type"
    }
    meant = [
        each
        for each in errors
        if each["type"] != "model_type"
        and not _SCHEMA_NAMES.isdisjoint(map(str, each["loc"]))
        and not any(each["loc"][: len(other)] == other for other in others)
    ]
    return meant or errors


def _expectation(error: ErrorDetails) -> str:
    """``must be a valid string``: pydantic's message without its own words for the input."""
    if error["type"] == "union_tag_invalid":
        return f"must be of type {error['ctx']['expected_tags']}"
    if error["type"] == "model_type":
        return "must be an object"
    message = error["msg"].partition(" after validation")[0]
    for begin, instead in (("Input should ", "must "), ("List should ", "must ")):
        if message.startswith(begin):
            return instead + message.removeprefix(begin)
    return f"is wrong: {message}"


def _path(location: Sequence[str | int]) -> str:
    """``messages[0].content[1].type``, without pydantic's names for the members of a union."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif "[" not in step and step not in ("str", "int", "bool", "float", *_SCHEMA_NAMES):
            path += f".{step}" if path else step
    return path
