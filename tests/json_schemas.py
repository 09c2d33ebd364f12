"""JSON schemas as clients send them: from pydantic, from tools, with all common keywords."""

from __future__ import annotations

from typing import Any


def _object(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


_STRING, _INTEGER = {"type": "string"}, {"type": "integer"}
_SHORT = {"type": "string", "maxLength": 8}

SCHEMAS: list[dict[str, Any]] = [
    {},
    {"type": "object"},
    {"type": "array"},
    _STRING,
    _INTEGER,
    {"type": "number"},
    {"type": "boolean"},
    {"type": "null"},
    {"type": ["string", "null"]},
    {"type": ["integer", "boolean", "null"]},
    {"const": "dinosaur"},
    {"const": {"a": [1, 2, None]}},
    {"enum": ["red", "green", "blue"]},
    {"enum": [1, "two", None, True]},
    {"type": "string", "minLength": 3, "maxLength": 6},
    {"type": "string", "maxLength": 0},
    {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"},
    {"type": "string", "pattern": "^(yes|no)( please)?$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "time"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "email"},
    {"type": "integer", "minimum": 5, "maximum": 25},
    {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 3},
    {"type": "integer", "minimum": 1000},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100},
    {"type": "array", "items": _INTEGER, "maxItems": 3},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [_SHORT, _INTEGER], "items": False, "minItems": 2},
    {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 5},
    {"type": "array", "items": {"type": "array", "items": _INTEGER, "maxItems": 2}, "maxItems": 2},
    _object(name=_SHORT, age=_INTEGER),
    _object(["a"], a=_INTEGER, b=_INTEGER, c={"type": "boolean"}),
    _object([], x={"type": "number"}),
    _object(),
    {"type": "object", "additionalProperties": _INTEGER},
    {
        "type": "object",
        "properties": {"kind": {"const": "k"}},
        "required": ["kind", "extra"],
        "additionalProperties": {"type": "boolean"},
    },
    _object(inner=_object(inner=_object(value=_INTEGER))),
    _object(
        items={
            "type": "array",
            "items": _object(id=_INTEGER, ok={"type": "boolean"}),
            "maxItems": 2,
        }
    ),
    {"anyOf": [_INTEGER, {"const": "none"}]},
    {"anyOf": [_object(a=_INTEGER), _object(b=_SHORT)]},
    {"oneOf": [_object(kind={"const": "a"}, n=_INTEGER), _object(kind={"const": "b"}, s=_SHORT)]},
    {"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 9}]},
    {"allOf": [_object(["a"], a=_INTEGER, b=_SHORT), {"required": ["b"]}]},
    {"$ref": "#/$defs/point", "$defs": {"point": _object(x=_INTEGER, y=_INTEGER)}},
    {
        "$defs": {
            "Tree": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "minimum": 0, "maximum": 9},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/Tree"}, "maxItems": 2},
                },
                "required": ["value", "children"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/Tree",
    },
    {
        "title": "Answer",
        "description": "As pydantic writes it.",
        "type": "object",
        "properties": {
            "title": {"title": "Title", "type": "string", "maxLength": 10, "examples": ["x"]},
            "score": {"title": "Score", "default": 1, "type": "number"},
            "tags": {
                "anyOf": [{"type": "array", "items": _SHORT}, {"type": "null"}],
                "default": None,
            },
            "mood": {"$ref": "#/$defs/Mood"},
        },
        "$defs": {"Mood": {"title": "Mood", "type": "string", "enum": ["good", "bad"]}},
        "required": ["title", "mood"],
        "additionalProperties": False,
    },
    _object(**{f"field_{i}": {"type": "boolean"} for i in range(8)}),
    _object(**{'quo"te': _INTEGER, "new\nline": _INTEGER, "naïve é": {"type": "null"}}),
    _object(when={"type": "string", "format": "date"}, who={"enum": ["ann", "bob"]}, many=_INTEGER),
    _object(
        location={"type": "string", "description": "The city", "maxLength": 12},
        unit={"type": "string", "enum": ["celsius", "fahrenheit"]},
        days={"type": "integer", "minimum": 1, "maximum": 14},
    ),
]
