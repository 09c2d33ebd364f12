"""Rewrites a client's JSON schema so that the grammar library follows it to an end.

The library takes a schema literally. Where that lets an answer run on without end, or where the
library would break the schema, the schema is written differently:

- an object that lists its ``properties`` is closed unless it says otherwise;
- a pattern of keys is left out where all keys that match it are among the ``properties``;
- a reference to a schema that only an infinite text can match is ``false``;
- an unknown ``format`` is left out, as an annotation;
- whole numbers without bounds have 64 bits, since a model may go on with digits;
- bounds that a double cannot hold are moved inwards to the next ones that it can.

It knows nothing of requests or vocabularies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from tokasaurus.grammars import accepts

__all__ = ["FORMATS", "for_grammar", "lists_keys"]

Schema: TypeAlias = Any
"""A mapping, or true or false; anything else is wrong, and the library refuses it."""

FORMATS = frozenset(
    [
        "date",
        "date-time",
        "duration",
        "email",
        "hostname",
        "ipv4",
        "ipv6",
        "time",
        "unknown",
        "uri",
        "uuid",
    ]
)
"""The values of ``format`` that the library enforces."""

_ALTERNATIVES = ("anyOf", "oneOf")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SINGLE = (
    "additionalItems",
    "additionalProperties",
    "contains",
    "else",
    "if",
    "items",
    "not",
    "propertyNames",
    "then",
)
_OPENERS = ("additionalProperties", "unevaluatedProperties")
_EXACT = 1 << 53
_LEAST, _MOST = -(1 << 63) + 1024, 1 << 63
"""The bounds of whole numbers that the library can follow; it takes the upper one as 2^63 - 1."""
_LONG = 10**18
"""From here on, the library needs a bound on both sides."""
_MAX_PATTERNS = 64  # each takes some milliseconds to check
_MAX_COPIES = 20_000
"""The number of subschemas that may be copied to close compositions of references."""


def for_grammar(schema: Schema) -> Schema:
    """The schema as the library should read it.

    Raises:
        ValueError: no finite text can match it, or it has a number that cannot be enforced.
    """
    return _Rewriter(schema).result()


def lists_keys(schema: Schema) -> bool:
    """Whether a schema lists the keys of an object, itself or in a subschema."""
    if isinstance(schema, dict):
        if isinstance(schema.get("properties"), dict):
            return True
        schema = list(schema.values())
    return any(lists_keys(each) for each in _list(schema))


class _Rewriter:
    def __init__(self, root: Schema) -> None:
        self._root = root
        self._num_copies = 0
        self._endless: set[str] = set()

    def result(self) -> Schema:
        self._endless = self._find_endless()
        if not self._ends(self._root, self._endless):
            raise ValueError("no finite text can match the schema: it requires itself")
        return self._closed(self._root, {}, {})

    # Closing objects.

    def _closed(
        self, schema: Schema, names: Mapping[str, Schema], patterns: Mapping[str, Schema]
    ) -> Schema:
        """A schema in which objects are closed.

        Args:
            schema: as the client wrote it.
            names: further keys that are allowed, since the schema around this one lists them.
            patterns: of such keys.
        """
        if not isinstance(schema, dict):
            return schema
        parts = [keyword for keyword in ("$ref", "allOf", *_ALTERNATIVES) if keyword in schema]
        lists = "properties" in schema or bool(names)
        members = schema.get("allOf")
        many = len(parts) > 1 or (isinstance(members, list) and len(members) > 1)
        if not parts or not (lists or many):
            return self._ended(self._closed_alone(schema, names, patterns))
        listed = list(self._parts(schema, set()))
        if any(opener in part for part in listed for opener in _OPENERS) or not (
            names or any("properties" in part for part in listed)
        ):
            return self._ended(self._rewritten(schema, closed=False))
        alternatives = next((each for each in _ALTERNATIVES if each in schema), None)
        if alternatives is not None and isinstance(schema[alternatives], list):
            rest = {name: each for name, each in schema.items() if name != alternatives}
            within = list(self._parts(rest, set()))
            names, patterns = {**names, **_names(within)}, {**patterns, **_patterns(within)}
            result = self._rewritten(rest, closed=False)
            result[alternatives] = [
                self._closed(
                    {"properties": {}, **each} if isinstance(each, dict) else each, names, patterns
                )
                for each in schema[alternatives]
            ]
            return self._ended(result)
        names = {**names, **_names(listed)}
        patterns = {**patterns, **_patterns(listed)}
        return self._ended(_close(self._rewritten(schema, closed=False), names, patterns))

    def _closed_alone(
        self, schema: Mapping[str, Any], names: Mapping[str, Schema], patterns: Mapping[str, Schema]
    ) -> Schema:
        """An object that is closed without regard to others."""
        result = self._rewritten(schema, closed=True)
        if "properties" in schema and not any(opener in schema for opener in _OPENERS):
            own = _names([schema])
            return _close(result, {**names, **own}, patterns)
        return result

    def _open(self, schema: Schema) -> Schema:
        """A part of a composition, which the whole closes."""
        self._count_copy()
        if not isinstance(schema, dict):
            return schema
        return self._ended(self._rewritten(schema, closed=False))

    def _parts(self, schema: Schema, seen: set[str]) -> Iterator[Mapping[str, Any]]:
        """The schemas that describe the same value: this one, and those that it is composed of."""
        self._count_copy()
        if not isinstance(schema, dict):
            return
        yield schema
        for keyword in ("allOf", *_ALTERNATIVES):
            for member in _list(schema.get(keyword)):
                yield from self._parts(member, seen)
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in seen:
            seen.add(reference)
            yield from self._parts(self._target(reference), seen)

    def _count_copy(self) -> None:
        self._num_copies += 1
        if self._num_copies > _MAX_COPIES:
            raise ValueError("allOf, anyOf and $ref refer to too many schemas")

    def _rewritten(self, schema: Mapping[str, Any], *, closed: bool) -> dict[str, Any]:
        """A copy with rewritten subschemas.

        Args:
            schema: a mapping.
            closed: whether parts that describe the same value are closed.
        """

        def value(each: Schema) -> Schema:
            return self._closed(each, {}, {})

        part: Callable[[Schema], Schema] = value if closed else self._open
        result = dict(schema)
        for keyword in _LISTS:
            if isinstance(schema.get(keyword), list):
                rewrite = part if keyword in ("allOf", *_ALTERNATIVES) else value
                result[keyword] = [rewrite(each) for each in schema[keyword]]
        for keyword in _MAPS:
            if isinstance(schema.get(keyword), dict):
                result[keyword] = {name: value(each) for name, each in schema[keyword].items()}
        for keyword in _SINGLE:
            if isinstance(schema.get(keyword), dict):
                result[keyword] = value(schema[keyword])
        reference = schema.get("$ref")
        if not closed and isinstance(reference, str):
            target = self._target(reference)
            if isinstance(target, dict) and not self._refers_to_itself(reference):
                del result["$ref"]
                members = [*_list(result.get("allOf")), self._open(target)]
                result["allOf"] = members
        return _checked(result)

    def _refers_to_itself(self, reference: str) -> bool:
        """Whether a schema is composed of itself, without a key or an item between."""
        seen: set[str] = set()
        for _ in self._parts(self._target(reference), seen):
            pass
        return reference in seen

    def _target(self, reference: str) -> Schema:
        """What a reference within the schema names; None if that is elsewhere."""
        if not reference.startswith("#"):
            return None
        at = self._root
        for step in reference[1:].split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            if isinstance(at, dict) and name in at:
                at = at[name]
            elif isinstance(at, list) and name.isdecimal() and int(name) < len(at):
                at = at[int(name)]
            else:
                return None
        return at

    # Schemas without an end.

    def _ended(self, schema: dict[str, Any]) -> Schema:
        return False if schema.get("$ref") in self._endless else schema

    def _find_endless(self) -> set[str]:
        """The references to schemas that only an infinite text can match."""
        # Later definitions first: most chains of references then need one pass.
        waiting = set(references := list(_references(self._root)))
        before = -1
        while before != len(waiting):
            before = len(waiting)
            for reference in reversed(references):
                if reference in waiting and self._ends(self._target(reference), waiting):
                    waiting.discard(reference)
        return waiting

    def _ends(self, schema: Schema, endless: set[str]) -> bool:
        """Whether a finite text can match, as far as references are known to end."""
        if not isinstance(schema, dict):
            return True
        if schema.get("$ref") in endless:
            return False
        if not all(self._ends(each, endless) for each in _list(schema.get("allOf"))):
            return False
        for keyword in _ALTERNATIVES:
            branches = _list(schema.get(keyword))
            if branches and not any(self._ends(each, endless) for each in branches):
                return False
        if schema.get("type") == "object" and isinstance(schema.get("properties"), dict):
            required = _list(schema.get("required"))
            return all(
                self._ends(each, endless)
                for name, each in schema["properties"].items()
                if name in required
            )
        num_items = schema.get("minItems", 0)
        if schema.get("type") == "array" and isinstance(num_items, int):
            first = _list(schema.get("prefixItems"))[:num_items]
            rest = [schema.get("items")] if len(first) < num_items else []
            return all(self._ends(each, endless) for each in [*first, *rest])
        return True


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _names(parts: Iterable[Mapping[str, Any]]) -> dict[str, Schema]:
    """The keys that schemas list or require, which may have any value."""
    names: dict[str, Schema] = {}
    for part in parts:
        properties = part.get("properties")
        required = [name for name in _list(part.get("required")) if isinstance(name, str)]
        names |= dict.fromkeys([*(properties if isinstance(properties, dict) else ()), *required])
    return {name: {} for name in names}


def _patterns(parts: Iterable[Mapping[str, Any]]) -> dict[str, Schema]:
    found = (part.get("patternProperties") for part in parts)
    return {pattern: {} for each in found if isinstance(each, dict) for pattern in each}


def _close(
    schema: dict[str, Any], names: Mapping[str, Schema], patterns: Mapping[str, Schema]
) -> dict[str, Any]:
    """Closes an object, unless it must have more keys than are listed."""
    own = schema.get("properties", {})
    keys = schema.get("patternProperties", {})
    if not isinstance(own, dict) or not isinstance(keys, dict):
        return schema  # the library refuses it
    least = schema.get("minProperties", 0)
    properties, keys = {**names, **own}, {**patterns, **keys}
    properties = {**own, **properties}  # in the order of the schema
    if not keys and isinstance(least, int) and least > len(properties):
        return schema
    result = {**schema, "properties": properties, "additionalProperties": False}
    return _without_dead_patterns({**result, "patternProperties": keys} if keys else result)


def _checked(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema whose keywords the library follows, apart from its subschemas."""
    if isinstance(schema.get("format"), str) and schema["format"] not in FORMATS:
        del schema["format"]
    for value in (*_list(schema.get("enum")), schema.get("const")):
        _check_exact(value)
    _move_bounds(schema)
    return _without_dead_patterns(schema)


def _without_dead_patterns(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without patterns of keys that match listed keys only.

    The library would offer another key of such a pattern, and then find no token for it.
    """
    properties, patterns = schema.get("properties"), schema.get("patternProperties")
    if not (properties and isinstance(properties, dict) and isinstance(patterns, dict)):
        return schema
    if len(patterns) > _MAX_PATTERNS:
        raise ValueError(f"patternProperties may hold at most {_MAX_PATTERNS} beside properties")
    begun = dict.fromkeys(properties)
    nulls = {name: {"type": "null"} for name in properties}
    kept, changed = {}, dict(properties)
    for pattern, value in patterns.items():
        object_: dict[str, Any] = {"type": "object", "properties": nulls, "required": list(nulls)}
        object_ |= {"patternProperties": {pattern: {}}, "additionalProperties": False}
        text = json.dumps(begun, separators=(",", ":"))
        if accepts(object_, text) and not accepts(object_, text[:-1] + ',"', whole=False):
            for name in properties:
                if accepts({"type": "string", "pattern": pattern}, json.dumps(name)):
                    changed[name] = {"allOf": [changed[name], value]}
        else:
            kept[pattern] = value
    if len(kept) == len(patterns):
        return schema
    rest = {name: each for name, each in schema.items() if name != "patternProperties"}
    rest["properties"] = changed
    return {**rest, "patternProperties": kept} if kept else rest


def _references(value: Any) -> Iterator[str]:
    """The references within a schema, and what looks like one in a constant."""
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        value = list(value.values())
    for each in _list(value):
        yield from _references(each)


def _check_exact(value: Any) -> None:
    """Raises ValueError if a constant holds a number that the library would round."""
    if isinstance(value, dict):
        value = list(value.values())
    for each in _list(value):
        _check_exact(each)
    if (
        isinstance(value, (int, float))
        and abs(value) > _EXACT
        and not (_LEAST <= value < _MOST and int(float(value)) == value)
    ):
        raise ValueError(f"the number {value} cannot be enforced exactly; write it as a string")


def _move_bounds(schema: dict[str, Any]) -> None:
    """Replaces bounds that a double does not hold by the next ones inside them.

    Whole numbers get bounds that are inclusive, on both sides where one is very large.
    """
    bounds = {
        name: schema[name]
        for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
        if isinstance(schema.get(name), (int, float)) and not isinstance(schema[name], bool)
    }
    if schema.get("type") == "integer" and not bounds and "multipleOf" not in schema:
        schema |= {"minimum": _LEAST, "maximum": _MOST}
    if not any(abs(value) >= _EXACT for value in bounds.values()):
        return
    kinds = schema.get("type")
    if (kinds != "integer" and "integer" not in _list(kinds)) or "number" in _list(kinds):
        for name, value in bounds.items():
            _move_bound(schema, name, value)
        return
    lower = [_whole(bounds["minimum"], math.ceil)] if "minimum" in bounds else []
    upper = [_whole(bounds["maximum"], math.floor)] if "maximum" in bounds else []
    if "exclusiveMinimum" in bounds:
        lower.append(_whole(bounds["exclusiveMinimum"], math.floor) + 1)
    if "exclusiveMaximum" in bounds:
        upper.append(_whole(bounds["exclusiveMaximum"], math.ceil) - 1)
    for name in bounds:
        del schema[name]
    least, most = max(lower, default=None), min(upper, default=None)
    if least is None and most is not None and most <= -_LONG:
        least = _LEAST
    if most is None and least is not None and least >= _LONG:
        most = _MOST
    if least is not None and most is not None and (least >= _MOST or most < _LEAST):
        raise ValueError(f"whole numbers from {least} to {most} cannot be enforced")
    if least is not None:
        schema["minimum"] = _inside(max(least, _LEAST), math.inf)
    if most is not None:
        schema["maximum"] = _MOST if most >= _MOST - 1 else _inside(most, -math.inf)


def _whole(value: float, rounded: Callable[[float], int]) -> int:
    if math.isinf(value):
        raise ValueError(f"a bound of {value} cannot be enforced")
    return value if isinstance(value, int) else rounded(value)


def _move_bound(schema: dict[str, Any], name: str, value: float) -> None:
    """Moves one bound of numbers that need not be whole."""
    moved = _inside(value, math.inf if name.endswith("inimum") else -math.inf)
    if moved == value:
        return
    del schema[name]
    other = "minimum" if name.endswith("inimum") else "maximum"
    both = [moved, schema[other]] if other in schema else [moved]
    schema[other] = max(both) if other == "minimum" else min(both)


def _inside(value: float, towards: float) -> int | float:
    """The next number from here that a double holds."""
    near = float(value)
    if near < value if towards > 0 else near > value:
        near = math.nextafter(near, towards)
    return int(near) if near.is_integer() else near
